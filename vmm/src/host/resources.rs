//! What a machine uses of the host: opened once, before anything starts, and kept over resets.

use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions},
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
};

use fanlight_api::{
    ApiError, CharBackend, DiskConfig, NetConfig, OrFd, PathOrFd, VmConfig, socket::Descriptors,
};
use fanlight_devices::{
    memory::{GuestRam, HugePageSize, RamError},
    vfio::VfioError,
    virtio::{
        block::{DiskError, DiskFormat, DiskImage},
        net::{Mac, MacError, Tap, TapError},
        vsock::{HOST_DEVICE, Vsock, VsockError},
    },
};
use thiserror::Error;

use crate::{
    host::console::{ConsoleError, HostConsole},
    host::files::open_at_once,
    vm::graphics::{Graphics, GraphicsError},
    vm::host_requests::HostRequests,
    vm::passthrough::{Passthrough, PassthroughError},
};

/// What is wrong with a configuration.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// There is nothing to boot.
    #[error("no kernel: give one with --kernel")]
    NoKernel,
    /// A file cannot be opened.
    #[error("{option} {}: cannot open it", path.display())]
    Open {
        /// The option that names it.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Not a file.
    #[error("{option} {}: not a regular file", path.display())]
    NotAFile {
        /// The option that names it.
        option: &'static str,
        /// What is there.
        path: PathBuf,
    },
    /// Not a size of pages.
    #[error("--memory hugepages={0}: say 2M or 1G")]
    HugePages(fanlight_api::ByteSize),
    /// Guest memory.
    #[error("--memory")]
    Ram(#[from] RamError),
    /// A disk.
    #[error("--disk")]
    Disk(#[from] DiskError),
    /// A disk's serial number.
    #[error("--disk serial={0}: at most 20 printable ASCII characters")]
    Serial(String),
    /// A network interface.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A hardware address.
    #[error("--net mac")]
    Mac(#[from] MacError),
    /// A passed-through device.
    #[error("--vfio")]
    Vfio(#[from] PassthroughError),
    /// What listens to the host.
    #[error(transparent)]
    Requests(#[from] VfioError),
    /// The GPU.
    #[error("--gpu")]
    Graphics(#[from] GraphicsError),
    /// Both consoles want the terminal.
    #[error(
        "--serial and --console both use stdio: give one of them another place, such as --serial null"
    )]
    TwoConsoles,
    /// A console.
    #[error("console")]
    Console(#[from] ConsoleError),
    /// The host's socket device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// A descriptor.
    #[error("{option}: {source}")]
    Descriptor {
        /// The option that names it.
        option: &'static str,
        /// The cause.
        source: ApiError,
    },
    /// Not a name for a device.
    #[error("id {0:?}: a device's name has 1 to 32 of a-z, A-Z, 0-9, -, _ and .")]
    Id(String),
    /// Two devices of one name.
    #[error("id {0:?}: another device has this name; give another")]
    IdTaken(String),
    /// Not a slot.
    #[error("port={0}: ports have numbers from 1 on")]
    Port(u8),
}

/// A disk of the machine.
pub struct Disk {
    /// Its name.
    pub id: String,
    /// The open image.
    pub image: Arc<DiskImage>,
    /// What the guest reads as its identity.
    pub serial: String,
    /// Root port, if it is behind one.
    pub port: Option<u8>,
}

/// A network interface of the machine.
pub struct Interface {
    /// Its name.
    pub id: String,
    /// The open tap.
    pub tap: Arc<Tap>,
    /// The guest's address.
    pub mac: Mac,
    /// Whether vhost-net is wanted.
    pub vhost: Option<bool>,
    /// Root port, if it is behind one.
    pub port: Option<u8>,
}

/// Everything that is open.
pub struct Resources {
    /// What was asked for.
    pub config: VmConfig,
    /// The kernel's path and file.
    pub kernel: (PathBuf, File),
    /// The hypervisor, if it was given open.
    pub kvm: Option<OwnedFd>,
    /// The host's socket device.
    pub vsock: Option<File>,
    /// The initial RAM disk's.
    pub initrd: Option<(PathBuf, File)>,
    /// Guest RAM.
    pub ram: GuestRam,
    /// Disks, in order.
    pub disks: Vec<Disk>,
    /// Network interfaces, in order.
    pub interfaces: Vec<Interface>,
    /// Passed-through devices.
    pub passthrough: Option<Passthrough>,
    /// Tells when the host wants one of those back.
    pub requests: HostRequests,
    /// Displays and what is typed and pointed at, if there is a GPU.
    pub graphics: Option<Graphics>,
    /// The serial port's host side.
    pub serial: HostConsole,
    /// The virtio console's, if there is one.
    pub console: Option<HostConsole>,
}

/// The host's sides of consoles.
pub struct Consoles<'a> {
    /// The serial port's.
    pub serial: &'a mut HostConsole,
    /// The virtio console's, if there is one.
    pub console: Option<&'a mut HostConsole>,
}

/// What changes as devices come and go.
pub struct Holdings<'a> {
    /// What the machine is made of now.
    pub config: &'a mut VmConfig,
    /// Guest RAM.
    pub ram: &'a GuestRam,
    /// Disks.
    pub disks: &'a mut Vec<Disk>,
    /// Network interfaces.
    pub interfaces: &'a mut Vec<Interface>,
    /// Passed-through devices.
    pub passthrough: &'a mut Option<Passthrough>,
    /// Tells when the host wants one of them back.
    pub requests: &'a HostRequests,
    /// GPUs and input devices.
    pub graphics: Option<&'a Graphics>,
}

impl Resources {
    /// Consoles, and the rest that a running machine changes.
    pub fn split(&mut self) -> (Consoles<'_>, Holdings<'_>) {
        let consoles = Consoles {
            serial: &mut self.serial,
            console: self.console.as_mut(),
        };
        let holdings = Holdings {
            config: &mut self.config,
            ram: &self.ram,
            disks: &mut self.disks,
            interfaces: &mut self.interfaces,
            passthrough: &mut self.passthrough,
            requests: &self.requests,
            graphics: self.graphics.as_ref(),
        };
        (consoles, holdings)
    }

    /// Opens everything that `config` names; descriptors that it names come from `descriptors`. The
    /// terminal comes last: no message is lost to its raw mode.
    pub fn open(mut config: VmConfig, descriptors: &Descriptors) -> Result<Self, ConfigError> {
        let kernel = config.kernel.as_ref().ok_or(ConfigError::NoKernel)?;
        let kernel = open_file("--kernel", kernel, descriptors)?;
        let initrd = config
            .initrd
            .as_ref()
            .map(|path| open_file("--initrd", path, descriptors))
            .transpose()?;
        let kvm = match &config.kvm {
            None => None,
            Some(OrFd::Fd(number)) => Some(take("kvm", descriptors, *number)?),
            Some(OrFd::Named(path)) => Some(
                open_at_once(OpenOptions::new().read(true).write(true), path)
                    .map_err(|source| ConfigError::Open {
                        option: "kvm",
                        path: path.clone(),
                        source,
                    })?
                    .into(),
            ),
        };
        let vsock = config
            .vsock
            .as_ref()
            .map(|vsock| match &vsock.device {
                Some(OrFd::Fd(number)) => {
                    take("--vsock device", descriptors, *number).map(File::from)
                }
                Some(OrFd::Named(path)) => Ok(Vsock::open_host_device(path)?),
                None => Ok(Vsock::open_host_device(HOST_DEVICE.as_ref())?),
            })
            .transpose()?;
        let hugepages = match config.memory.hugepages {
            None => None,
            Some(size) if size.0 == HugePageSize::Size2M.bytes() => Some(HugePageSize::Size2M),
            Some(size) if size.0 == HugePageSize::Size1G.bytes() => Some(HugePageSize::Size1G),
            Some(size) => return Err(ConfigError::HugePages(size)),
        };
        let ram = GuestRam::new(config.memory.size.0, hugepages)?;
        name_devices(&mut config)?;
        let disks = config
            .disk
            .iter()
            .map(|disk| Disk::open(disk, descriptors))
            .collect::<Result<_, _>>()?;
        let interfaces = config
            .net
            .iter()
            .map(|net| Interface::open(net, descriptors))
            .collect::<Result<_, _>>()?;
        for device in &config.vfio {
            check_port(device.port)?;
        }
        let passthrough = Passthrough::open(&config.vfio, descriptors)?;
        let requests = HostRequests::new(passthrough.as_ref())?;
        let graphics = Graphics::new(&config.gpu, &ram)?;
        let console = config.console.as_ref().map(|console| &console.0);
        if config.serial == CharBackend::Stdio && console == Some(&CharBackend::Stdio) {
            return Err(ConfigError::TwoConsoles);
        }
        let console = console
            .map(|backend| HostConsole::open("console", backend))
            .transpose()?;
        Ok(Self {
            serial: HostConsole::open("serial", &config.serial)?,
            console,
            kernel,
            kvm,
            vsock,
            initrd,
            ram,
            disks,
            interfaces,
            passthrough,
            requests,
            graphics,
            config,
        })
    }
}

fn take(
    option: &'static str,
    descriptors: &Descriptors,
    number: u32,
) -> Result<OwnedFd, ConfigError> {
    descriptors
        .take(number)
        .map_err(|source| ConfigError::Descriptor { option, source })
}

fn open_file(
    option: &'static str,
    file: &PathOrFd,
    descriptors: &Descriptors,
) -> Result<(PathBuf, File), ConfigError> {
    let path = PathBuf::from(file.to_string());
    let error = |source| ConfigError::Open {
        option,
        path: path.clone(),
        source,
    };
    let file = match file {
        OrFd::Named(path) => open_at_once(OpenOptions::new().read(true), path).map_err(error)?,
        OrFd::Fd(number) => take(option, descriptors, *number)?.into(),
    };
    if !file.metadata().map_err(error)?.is_file() {
        return Err(ConfigError::NotAFile { option, path });
    }
    Ok((path, file))
}

/// Gives every device a name of its own.
fn name_devices(config: &mut VmConfig) -> Result<(), ConfigError> {
    let mut taken = BTreeSet::new();
    let given = config.disk.iter().map(|disk| &disk.id);
    let given = given.chain(config.net.iter().map(|net| &net.id));
    let given = given.chain(config.vfio.iter().map(|device| &device.id));
    for id in given.flatten() {
        check_id(id)?;
        if !taken.insert(id.clone()) {
            return Err(ConfigError::IdTaken(id.clone()));
        }
    }
    for (kind, id) in config
        .disk
        .iter_mut()
        .map(|disk| ("disk", &mut disk.id))
        .chain(config.net.iter_mut().map(|net| ("net", &mut net.id)))
        .chain(
            config
                .vfio
                .iter_mut()
                .map(|device| ("vfio", &mut device.id)),
        )
    {
        if id.is_none() {
            let name = free_id(kind, |name| taken.contains(name));
            taken.insert(name.clone());
            *id = Some(name);
        }
    }
    Ok(())
}

/// Whether a device can have this name.
pub fn check_id(id: &str) -> Result<(), ConfigError> {
    const MAX: usize = 32;
    let valid = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if (1..=MAX).contains(&id.len()) && id.bytes().all(valid) {
        Ok(())
    } else {
        Err(ConfigError::Id(id.into()))
    }
}

/// The first name of its kind that is not taken: `disk0`, `disk1`, …
pub fn free_id(kind: &str, taken: impl Fn(&str) -> bool) -> String {
    let mut number = 0;
    loop {
        let name = format!("{kind}{number}");
        if !taken(&name) {
            return name;
        }
        number += 1;
    }
}

fn check_port(port: Option<u8>) -> Result<Option<u8>, ConfigError> {
    match port {
        Some(0) => Err(ConfigError::Port(0)),
        port => Ok(port),
    }
}

impl Disk {
    /// Opens the image of a disk that has a name.
    pub fn open(config: &DiskConfig, descriptors: &Descriptors) -> Result<Self, ConfigError> {
        /// What the protocol has room for.
        const SERIAL_MAX: usize = 20;
        let id = config.id.clone().unwrap_or_default();
        let format = config.format.map(|format| match format {
            fanlight_api::DiskFormat::Raw => DiskFormat::Raw,
            fanlight_api::DiskFormat::Qcow2 => DiskFormat::Qcow2,
        });
        let serial = config.serial.clone().unwrap_or_else(|| {
            let default = format!("fanlight-{}", id.trim_start_matches("disk"));
            default.chars().take(SERIAL_MAX).collect()
        });
        if serial.len() > SERIAL_MAX || !serial.bytes().all(|b| (b' '..=b'~').contains(&b)) {
            return Err(ConfigError::Serial(serial));
        }
        let image = match &config.path {
            OrFd::Named(path) => DiskImage::open(path, config.readonly, format)?,
            OrFd::Fd(number) => {
                let file = take("--disk", descriptors, *number)?.into();
                let name = PathBuf::from(config.path.to_string());
                DiskImage::from_file(file, &name, config.readonly, format)?
            }
        };
        Ok(Self {
            id,
            image: Arc::new(image),
            serial,
            port: check_port(config.port)?,
        })
    }
}

impl Interface {
    /// Opens the tap of an interface that has a name.
    pub fn open(config: &NetConfig, descriptors: &Descriptors) -> Result<Self, ConfigError> {
        let id = config.id.clone().unwrap_or_default();
        let mac = match (&config.mac, &config.tap) {
            (Some(text), _) => text.parse()?,
            (None, OrFd::Named(tap)) => Mac::for_name(tap),
            // Two machines may well be given descriptors of one number.
            (None, OrFd::Fd(_)) => Mac::for_name(&format!("{id}@{}", std::process::id())),
        };
        let tap = match &config.tap {
            OrFd::Named(name) => Tap::open(name)?,
            OrFd::Fd(number) => {
                let fd = take("--net", descriptors, *number)?;
                Tap::from_fd(fd, &config.tap.to_string())?
            }
        };
        Ok(Self {
            id,
            tap: Arc::new(tap),
            mac,
            vhost: config.vhost,
            port: check_port(config.port)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(json: &str) -> String {
        let config = serde_json::from_str(json).unwrap();
        match Resources::open(config, &Descriptors::Inherited) {
            Ok(_) => panic!("{json} is accepted"),
            Err(error) => fanlight_devices::error_line(&error),
        }
    }

    #[test]
    fn devices_have_names_of_their_own() {
        let mut config: VmConfig =
            serde_json::from_str(r#"{"disk": [{"path": "a"}, {"path": "b", "id": "disk0"}]}"#)
                .unwrap();
        name_devices(&mut config).unwrap();
        let ids: Vec<_> = config.disk.iter().map(|d| d.id.as_deref()).collect();
        assert_eq!(ids, [Some("disk1"), Some("disk0")]);
        config.disk[0].id = Some("disk0".into());
        assert!(name_devices(&mut config).is_err());
        config.disk[0].id = Some("a b".into());
        assert!(name_devices(&mut config).is_err());
    }

    #[test]
    fn nobody_waits_for_the_other_end_of_a_fifo() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o600.into()).unwrap();
        let path = path.display();
        let kernel = error(&format!(r#"{{"kernel": "{path}"}}"#));
        assert!(kernel.contains("not a regular file"), "{kernel}");
        let exe = r#""kernel": "/proc/self/exe", "memory": {"size": "64M"}"#;
        let disk = error(&format!(
            r#"{{{exe}, "disk": [{{"path": "{path}", "readonly": true}}]}}"#
        ));
        assert!(disk.contains("fifo"), "{disk}");
        let serial = error(&format!(r#"{{{exe}, "serial": {{"file": "{path}"}}}}"#));
        assert!(serial.contains("cannot write console output"), "{serial}");
    }

    #[test]
    fn mistakes_are_one_line_that_names_the_option() {
        assert_eq!(error("{}"), "no kernel: give one with --kernel");
        let missing = error(r#"{"kernel": "/nowhere"}"#);
        assert!(missing.starts_with("--kernel /nowhere: cannot open it: No such file"));
        assert!(error(r#"{"kernel": "/"}"#).contains("not a regular file"));
        let exe = "/proc/self/exe";
        assert!(
            error(&format!(
                r#"{{"kernel": "{exe}", "memory": {{"size": "4K"}}}}"#
            ))
            .contains("--memory")
        );
        assert!(
            error(&format!(
                r#"{{"kernel": "{exe}", "memory": {{"size": "1G", "hugepages": "4M"}}}}"#
            ))
            .contains("2M or 1G")
        );
        assert!(
            error(&format!(r#"{{"kernel": "{exe}", "console": "stdio"}}"#))
                .contains("--serial null")
        );
    }
}
