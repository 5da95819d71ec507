//! Host resources of a machine: opened once, before anything starts, and kept over resets.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::OwnedFd,
    path::PathBuf,
};

use fanlight_api::{OrFd, PathOrFd, VmConfig, socket::Descriptors};
use fanlight_devices::memory::{GuestRam, HugePageSize, RamError};
use thiserror::Error;

use crate::{
    host::{
        console::{ConsoleError, HostConsole},
        files::open_at_once,
    },
    vm::{
        devices::{DeviceError, Devices, Opening, host_requests::HostRequests, names},
        error::MachineError,
        fault::{BadDescriptor, Classify, Fault},
    },
};

/// Why the resources of a configuration cannot be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// No kernel is named.
    #[error("no kernel is named: a machine needs a bzImage or an ELF vmlinux")]
    NoKernel,
    /// A file cannot be opened.
    #[error("{}: cannot open it", path.display())]
    Open {
        /// The field that names it.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Not a regular file.
    #[error("{}: not a regular file", path.display())]
    NotAFile {
        /// The field that names it.
        field: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// A descriptor.
    #[error("{source}")]
    Descriptor {
        /// The field that names it.
        field: &'static str,
        /// The cause.
        source: BadDescriptor,
    },
    /// Not a size of pages.
    #[error("hugepages={0}: say 2M or 1G")]
    HugePages(fanlight_api::ByteSize),
    /// Guest memory.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The descriptor that waits for requests of the host.
    #[error("cannot wait for the host's requests")]
    Requests(#[source] io::Error),
    /// The serial port's backend.
    #[error("serial port")]
    Serial(#[from] ConsoleError),
}

impl OpenError {
    /// The field of the configuration that the error is about, if it is about one. Its option of the command line has
    /// the same name.
    pub fn field(&self) -> Option<&'static str> {
        match self {
            Self::NoKernel => Some("kernel"),
            Self::Open { field, .. }
            | Self::NotAFile { field, .. }
            | Self::Descriptor { field, .. } => Some(field),
            Self::HugePages(_) | Self::Ram(_) => Some("memory"),
            Self::Device(error) => Some(error.field),
            Self::Requests(_) => None,
            Self::Serial(_) => Some("serial"),
        }
    }
}

impl Classify for OpenError {
    fn fault(&self) -> Fault {
        match self {
            Self::NoKernel | Self::Open { .. } | Self::NotAFile { .. } | Self::HugePages(_) => {
                Fault::Input
            }
            Self::Descriptor { source, .. } => source.fault(),
            Self::Ram(error) => error.fault(),
            Self::Device(error) => error.fault(),
            Self::Requests(_) => Fault::Host,
            Self::Serial(error) => error.fault(),
        }
    }
}

/// Everything that is open.
pub struct Resources {
    /// Files that the guest boots.
    pub boot: BootFiles,
    /// Guest RAM.
    pub ram: GuestRam,
    /// Backends of the consoles.
    pub consoles: Consoles,
    /// Devices and the configuration.
    pub hotplug: HotplugState,
    /// The hypervisor, if it was given open.
    kvm: Option<OwnedFd>,
}

/// What changes as devices are added and removed. It is kept over resets.
pub struct HotplugState {
    /// The configuration of the machine as it is now.
    pub config: VmConfig,
    /// The host side of its devices.
    pub devices: Devices,
    /// Readable when the host wants a passed-through device back.
    pub requests: HostRequests,
}

/// Paths and files that the guest boots.
pub struct BootFiles {
    /// The kernel's.
    pub kernel: (PathBuf, File),
    /// The initial RAM disk's.
    pub initrd: Option<(PathBuf, File)>,
}

/// Backends of the consoles.
pub struct Consoles {
    /// The serial port's.
    pub serial: HostConsole,
    /// The virtio console's, if there is one.
    pub virtio: Option<HostConsole>,
}

impl Resources {
    /// Opens everything that `config` names; descriptors come from `descriptors`. The terminal comes last, so that
    /// messages before it are printed in cooked mode.
    pub fn open(mut config: VmConfig, descriptors: &Descriptors) -> Result<Self, OpenError> {
        let boot = BootFiles::open(&config, descriptors)?;
        let kvm = open_kvm(&config, descriptors)?;
        let ram = open_ram(&config)?;
        names::assign(&mut config)?;
        let mut opening = Opening {
            config: &config,
            descriptors,
            ram: &ram,
            present: &Devices::default(),
            console: None,
        };
        let devices = Devices::open(&mut opening)?;
        let consoles = Consoles {
            virtio: opening.console,
            serial: HostConsole::open("serial", &config.serial)?,
        };
        let requests = HostRequests::new(&devices).map_err(OpenError::Requests)?;
        Ok(Self {
            boot,
            ram,
            consoles,
            hotplug: HotplugState {
                config,
                devices,
                requests,
            },
            kvm,
        })
    }

    /// The configuration of the machine as it is now.
    pub fn config(&self) -> &VmConfig {
        &self.hotplug.config
    }

    /// A duplicate of the hypervisor's descriptor, if it was given open.
    pub fn open_kvm(&self) -> Result<Option<OwnedFd>, MachineError> {
        let device = self.kvm.as_ref().map(OwnedFd::try_clone);
        device
            .transpose()
            .map_err(MachineError::host("duplicate a descriptor"))
    }
}

impl BootFiles {
    fn open(config: &VmConfig, descriptors: &Descriptors) -> Result<Self, OpenError> {
        let kernel = config.kernel.as_ref().ok_or(OpenError::NoKernel)?;
        let initrd = config.initrd.as_ref();
        let initrd = initrd.map(|file| open_file("initrd", file, descriptors));
        Ok(Self {
            kernel: open_file("kernel", kernel, descriptors)?,
            initrd: initrd.transpose()?,
        })
    }
}

fn open_kvm(config: &VmConfig, descriptors: &Descriptors) -> Result<Option<OwnedFd>, OpenError> {
    match &config.kvm {
        None => Ok(None),
        Some(OrFd::Fd(number)) => take("kvm", descriptors, *number).map(Some),
        Some(OrFd::Named(path)) => {
            let opened = open_at_once(OpenOptions::new().read(true).write(true), path);
            let opened = opened.map_err(|source| OpenError::Open {
                field: "kvm",
                path: path.clone(),
                source,
            })?;
            Ok(Some(opened.into()))
        }
    }
}

fn open_ram(config: &VmConfig) -> Result<GuestRam, OpenError> {
    let sizes = [HugePageSize::Size2M, HugePageSize::Size1G];
    let page = |asked: fanlight_api::ByteSize| {
        let known = sizes.into_iter().find(|size| size.bytes() == asked.0);
        known.ok_or(OpenError::HugePages(asked))
    };
    let pages = config.memory.hugepages.map(page).transpose()?;
    Ok(GuestRam::new(config.memory.size.0, pages)?)
}

fn take(field: &'static str, descriptors: &Descriptors, number: u32) -> Result<OwnedFd, OpenError> {
    let taken = descriptors.take(number).map_err(BadDescriptor);
    taken.map_err(|source| OpenError::Descriptor { field, source })
}

fn open_file(
    field: &'static str,
    file: &PathOrFd,
    descriptors: &Descriptors,
) -> Result<(PathBuf, File), OpenError> {
    let path = PathBuf::from(file.to_string());
    let error = |source| OpenError::Open {
        field,
        path: path.clone(),
        source,
    };
    let file = match file {
        OrFd::Named(path) => open_at_once(OpenOptions::new().read(true), path).map_err(error)?,
        OrFd::Fd(number) => take(field, descriptors, *number)?.into(),
    };
    if !file.metadata().map_err(error)?.is_file() {
        return Err(OpenError::NotAFile { field, path });
    }
    Ok((path, file))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(json: &str) -> (Option<&'static str>, String) {
        let config = serde_json::from_str(json).unwrap();
        match Resources::open(config, &Descriptors::Inherited) {
            Ok(_) => panic!("{json} is accepted"),
            Err(error) => {
                assert_eq!(error.fault(), Fault::Input, "{error}");
                (error.field(), fanlight_devices::error_line(&error))
            }
        }
    }

    #[test]
    fn nobody_waits_for_the_other_end_of_a_fifo() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o600.into()).unwrap();
        let path = path.display();
        let (_, kernel) = error(&format!(r#"{{"kernel": "{path}"}}"#));
        assert!(kernel.contains("not a regular file"), "{kernel}");
        let exe = r#""kernel": "/proc/self/exe", "memory": {"size": "64M"}"#;
        let (_, disk) = error(&format!(
            r#"{{{exe}, "disk": [{{"path": "{path}", "readonly": true}}]}}"#
        ));
        assert!(disk.contains("fifo"), "{disk}");
        let (_, serial) = error(&format!(r#"{{{exe}, "serial": {{"file": "{path}"}}}}"#));
        assert!(serial.contains("cannot write console output"), "{serial}");
    }

    #[test]
    fn a_device_that_is_off_is_not_there() {
        let has_entropy = |more: &str| {
            let json = format!(
                r#"{{"kernel": "/proc/self/exe", "serial": "null", "memory": {{"size": "64M"}}{more}}}"#
            );
            let config = serde_json::from_str(&json).unwrap();
            let resources = Resources::open(config, &Descriptors::Inherited).unwrap();
            let mut devices = resources.hotplug.devices.iter();
            devices.any(|device| device.id() == "rng")
        };
        assert!(has_entropy(""));
        assert!(!has_entropy(r#", "rng": {"enabled": false}"#));
    }

    #[test]
    fn mistakes_are_one_line_and_name_their_field() {
        assert_eq!(error("{}").0, Some("kernel"));
        let (field, missing) = error(r#"{"kernel": "/nowhere"}"#);
        assert_eq!(field, Some("kernel"));
        assert!(missing.starts_with("/nowhere: cannot open it: No such file"));
        assert!(error(r#"{"kernel": "/"}"#).1.contains("not a regular file"));
        let with = |more: &str| error(&format!(r#"{{"kernel": "/proc/self/exe", {more}}}"#));
        assert_eq!(with(r#""memory": {"size": "4K"}"#).0, Some("memory"));
        let (field, pages) = with(r#""memory": {"size": "1G", "hugepages": "4M"}"#);
        assert_eq!(field, Some("memory"));
        assert!(pages.contains("2M or 1G"), "{pages}");
        let (field, stdio) = with(r#""console": "stdio""#);
        assert_eq!(field, Some("console"));
        assert!(stdio.contains("null for the serial port"), "{stdio}");
        let (field, disk) = with(r#""disk": [{"path": "/nowhere", "id": "data"}]"#);
        assert_eq!(field, Some("disk"));
        assert!(disk.starts_with("disk data: "), "{disk}");
    }

    #[test]
    fn a_name_is_one_device() {
        let exe = r#""kernel": "/proc/self/exe", "memory": {"size": "64M"}"#;
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let path = image.path().display();
        let (_, taken) = error(&format!(
            r#"{{{exe}, "disk": [{{"path": "{path}", "id": "rng"}}]}}"#
        ));
        assert!(taken.contains("another device has this name"), "{taken}");
    }
}
