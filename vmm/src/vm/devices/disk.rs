//! Disks: an image file or block device of the host, shown as a virtio block device.

use std::{io, path::PathBuf, sync::Arc};

use fanlight_api::{DiskConfig, OrFd, VmConfig, socket::Descriptors, types::AddDevice};
use fanlight_devices::virtio::block::{Block, DiskError, DiskFormat, DiskImage};
use thiserror::Error;

use super::{Device, Devices, Entry, Failure, Hotplug, Kind, Life, Opened, Opening, Place};
use crate::vm::{
    fault::{BadDescriptor, Classify, Fault},
    function::Function,
};

/// Mass storage controller, other (PCI Code and ID Assignment 1.11).
const CLASS_MASS_STORAGE_OTHER: u32 = 0x01_8000;

/// Disks, in the configuration's order.
pub static KIND: Kind = Kind {
    field: "disk",
    title: "disk",
    open,
    hotplug: Some(Hotplug::of::<DiskConfig>()),
};

/// A disk of the machine.
struct Disk {
    id: String,
    image: Arc<DiskImage>,
    /// What the guest reads as the disk's identity.
    serial: String,
    port: Option<u8>,
}

/// Why a disk cannot be opened.
#[derive(Debug, Error)]
enum OpenError {
    /// The image.
    #[error(transparent)]
    Image(#[from] DiskError),
    /// The serial number is too long, or cannot be printed.
    #[error("serial number {0:?}: at most 20 printable ASCII characters")]
    Serial(String),
    /// The descriptor.
    #[error(transparent)]
    Descriptor(#[from] BadDescriptor),
}

impl Classify for OpenError {
    fn fault(&self) -> Fault {
        match self {
            Self::Image(error) => error.fault(),
            Self::Serial(_) => Fault::Input,
            Self::Descriptor(error) => error.fault(),
        }
    }
}

impl Classify for DiskError {
    fn fault(&self) -> Fault {
        match self {
            DiskError::Open { .. }
            | DiskError::Flags { .. }
            | DiskError::InUse(_)
            | DiskError::Ambiguous(_)
            | DiskError::NotQcow2(_)
            | DiskError::Encrypted(_)
            | DiskError::Format { .. }
            | DiskError::Size { .. } => Fault::Input,
        }
    }
}

fn open(opening: &mut Opening) -> Opened {
    let descriptors = opening.descriptors;
    KIND.open_each(
        &opening.config.disk,
        |c| c.id.as_deref(),
        |config| Ok(Disk::open(config, descriptors)?),
    )
}

impl Entry for DiskConfig {
    fn of_config(config: &mut VmConfig) -> &mut Vec<Self> {
        &mut config.disk
    }

    fn of_request(request: &mut AddDevice) -> &mut Option<Self> {
        &mut request.disk
    }

    fn place(&mut self) -> Place<'_> {
        Place {
            id: &mut self.id,
            port: &mut self.port,
        }
    }
}

impl Disk {
    fn open(config: &DiskConfig, descriptors: &Descriptors) -> Result<Self, OpenError> {
        /// `VIRTIO_BLK_ID_BYTES` (Virtio 1.3, 5.2.6).
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
            return Err(OpenError::Serial(serial));
        }
        let image = match &config.path {
            OrFd::Named(path) => DiskImage::open(path, config.readonly, format)?,
            OrFd::Fd(number) => {
                let file = descriptors.take(*number).map_err(BadDescriptor)?.into();
                let name = PathBuf::from(config.path.to_string());
                DiskImage::from_file(file, &name, config.readonly, format)?
            }
        };
        Ok(Self {
            id,
            image: Arc::new(image),
            serial,
            port: config.port,
        })
    }
}

impl Device for Disk {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn port(&self) -> Option<u8> {
        self.port
    }

    fn build(&self, life: &mut Life) -> Result<Function, Failure> {
        let block = Block::new(self.image.clone(), self.serial.clone(), life.cpus);
        life.virtio(Box::new(block), CLASS_MASS_STORAGE_OTHER)
    }
}

/// Why a disk cannot be resized.
#[derive(Debug, Error)]
pub enum ResizeError {
    /// No disk of that name.
    #[error("there is no disk {id:?}; device.list has their names")]
    NotFound {
        /// The name that was asked for.
        id: String,
        /// The disks that there are.
        names: Vec<String>,
    },
    /// The image cannot have that size, or the host cannot give it.
    #[error("disk {id:?} cannot be {size} bytes: {source}")]
    Image {
        /// The disk.
        id: String,
        /// What was asked for, in bytes.
        size: u64,
        /// The cause.
        source: io::Error,
    },
}

impl Classify for ResizeError {
    fn fault(&self) -> Fault {
        match self {
            Self::NotFound { .. } => Fault::Input,
            Self::Image { source, .. } => match source.kind() {
                io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported => Fault::Input,
                _ => Fault::Host,
            },
        }
    }
}

/// Grows the disk `id` and returns its new size in bytes. The caller tells the guest.
pub fn resize(devices: &Devices, id: &str, size: u64) -> Result<u64, ResizeError> {
    let disk = devices.of::<Disk>().find(|disk| disk.id == id);
    let disk = disk.ok_or_else(|| ResizeError::NotFound {
        id: id.into(),
        names: devices.of::<Disk>().map(|disk| disk.id.clone()).collect(),
    })?;
    disk.image.grow(size).map_err(|source| ResizeError::Image {
        id: id.into(),
        size,
        source,
    })?;
    Ok(disk.image.size())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(spec: &str) -> Result<Disk, OpenError> {
        Disk::open(&spec.parse().unwrap(), &Descriptors::Inherited)
    }

    #[test]
    fn a_serial_number_fits_the_protocol() {
        let error = open("/dev/null,serial=123456789012345678901");
        assert!(matches!(error, Err(OpenError::Serial(_))));
        assert!(matches!(
            open("/dev/null,serial=é"),
            Err(OpenError::Serial(_))
        ));
    }

    #[test]
    fn a_disk_grows_and_others_are_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let spec = format!("{},id=data", file.path().display());
        let mut devices = Devices::default();
        devices.push(Box::new(open(&spec).unwrap()));
        assert_eq!(resize(&devices, "data", 2 << 20).unwrap(), 2 << 20);
        let smaller = resize(&devices, "data", 1 << 20).unwrap_err();
        assert_eq!(smaller.fault(), Fault::Input);
        match resize(&devices, "date", 4 << 20).unwrap_err() {
            ResizeError::NotFound { names, .. } => assert_eq!(names, ["data"]),
            error => panic!("{error}"),
        }
    }
}
