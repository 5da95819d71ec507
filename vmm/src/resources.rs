//! What a machine uses of the host: opened once, before anything starts, and kept over resets.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use fanlight_api::{CharBackend, DiskConfig, NetConfig, VmConfig};
use fanlight_devices::{
    memory::{GuestRam, HugePageSize, RamError},
    virtio::{
        block::{DiskError, DiskFormat, DiskImage},
        net::{Mac, MacError, Tap, TapError},
    },
};
use thiserror::Error;

use crate::{
    console::{ConsoleError, HostConsole},
    passthrough::{Passthrough, PassthroughError},
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
    /// Both consoles want the terminal.
    #[error(
        "--serial and --console both use stdio: give one of them another place, such as --serial null"
    )]
    TwoConsoles,
    /// A console.
    #[error("console")]
    Console(#[from] ConsoleError),
}

/// A disk of the machine.
pub struct Disk {
    /// The open image.
    pub image: Arc<DiskImage>,
    /// What the guest reads as its identity.
    pub serial: String,
    /// Root port, if it is behind one.
    pub port: Option<u8>,
}

/// A network interface of the machine.
pub struct Interface {
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
    /// The serial port's host side.
    pub serial: HostConsole,
    /// The virtio console's, if there is one.
    pub console: Option<HostConsole>,
}

impl Resources {
    /// Opens everything that `config` names. The terminal comes last: no message is lost to its raw mode.
    pub fn open(config: VmConfig) -> Result<Self, ConfigError> {
        let kernel = config.kernel.as_deref().ok_or(ConfigError::NoKernel)?;
        let kernel = open_file("--kernel", kernel)?;
        let initrd = config
            .initrd
            .as_deref()
            .map(|path| open_file("--initrd", path))
            .transpose()?;
        let hugepages = match config.memory.hugepages {
            None => None,
            Some(size) if size.0 == HugePageSize::Size2M.bytes() => Some(HugePageSize::Size2M),
            Some(size) if size.0 == HugePageSize::Size1G.bytes() => Some(HugePageSize::Size1G),
            Some(size) => return Err(ConfigError::HugePages(size)),
        };
        let ram = GuestRam::new(config.memory.size.0, hugepages)?;
        let disks = config
            .disk
            .iter()
            .zip(0..)
            .map(|(disk, index)| open_disk(disk, index))
            .collect::<Result<_, _>>()?;
        let interfaces = config
            .net
            .iter()
            .map(open_interface)
            .collect::<Result<_, _>>()?;
        let passthrough = Passthrough::open(&config.vfio)?;
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
            initrd,
            ram,
            disks,
            interfaces,
            passthrough,
            config,
        })
    }
}

fn open_file(option: &'static str, path: &Path) -> Result<(PathBuf, File), ConfigError> {
    let error = |source| ConfigError::Open {
        option,
        path: path.into(),
        source,
    };
    let file = File::open(path).map_err(error)?;
    if !file.metadata().map_err(error)?.is_file() {
        return Err(ConfigError::NotAFile {
            option,
            path: path.into(),
        });
    }
    Ok((path.into(), file))
}

fn open_disk(config: &DiskConfig, index: u32) -> Result<Disk, ConfigError> {
    /// What the protocol has room for.
    const SERIAL_MAX: usize = 20;
    let format = config.format.map(|format| match format {
        fanlight_api::DiskFormat::Raw => DiskFormat::Raw,
        fanlight_api::DiskFormat::Qcow2 => DiskFormat::Qcow2,
    });
    let serial = config
        .serial
        .clone()
        .unwrap_or_else(|| format!("fanlight-{index}"));
    if serial.len() > SERIAL_MAX || !serial.bytes().all(|b| (b' '..=b'~').contains(&b)) {
        return Err(ConfigError::Serial(serial));
    }
    Ok(Disk {
        image: Arc::new(DiskImage::open(&config.path, config.readonly, format)?),
        serial,
        port: config.port,
    })
}

fn open_interface(config: &NetConfig) -> Result<Interface, ConfigError> {
    let mac = match &config.mac {
        Some(text) => text.parse()?,
        None => Mac::for_name(&config.tap),
    };
    Ok(Interface {
        tap: Arc::new(Tap::open(&config.tap)?),
        mac,
        vhost: config.vhost,
        port: config.port,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(json: &str) -> String {
        let config = serde_json::from_str(json).unwrap();
        match Resources::open(config) {
            Ok(_) => panic!("{json} is accepted"),
            Err(error) => fanlight_devices::error_line(&error),
        }
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
