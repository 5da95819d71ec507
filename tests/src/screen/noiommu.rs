//! A device in a guest's own vfio-pci, without an IOMMU: what user space can do there with a passed-through
//! device's memory (Linux `Documentation/driver-api/vfio.rst`).

use std::{
    ffi::CString,
    fs::{self, File},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use fanlight_devices::{
    error_line,
    vfio::dmabuf::{self, Access, BarRange},
};

use crate::{
    Context, Failure, Result,
    pci::{Function, Mmio},
};

const VFIO_SET_IOMMU: u64 = 0x3b66;
const VFIO_GROUP_SET_CONTAINER: u64 = 0x3b68;
const VFIO_GROUP_GET_DEVICE_FD: u64 = 0x3b6a;
const VFIO_DEVICE_RESET: u64 = 0x3b6f;
const VFIO_NOIOMMU_IOMMU: u64 = 8;
/// VFIO's number for configuration space.
const CONFIG: u32 = 7;
const COMMAND: u64 = 4;
const MEMORY: u16 = 0b10;

/// A device that is open.
#[derive(Debug)]
pub struct NoIommu {
    device: File,
    _group: File,
    _container: File,
}

impl NoIommu {
    /// Takes a function from whatever driver it has, and opens it.
    pub fn open(function: &Function) -> Result<Self> {
        let address = function.address();
        let write = |path: &str, text: &str| {
            fs::write(path, text).context(format!("cannot write {text:?} to {path}"))
        };
        write(
            &format!("{}/driver_override", function.path().display()),
            "vfio-pci",
        )?;
        if !function.path().join("driver").exists() {
            write("/sys/bus/pci/drivers_probe", &address)?;
        }
        let group = fs::read_link(function.path().join("iommu_group"));
        let group = group.context("the guest's vfio-pci has not made a group")?;
        let number = group.file_name().unwrap_or_default().to_string_lossy();
        let open = |path: String| {
            let file = File::options().read(true).write(true).open(&path);
            file.context(format!("cannot open {path}"))
        };
        let container = open("/dev/vfio/vfio".into())?;
        let group = open(format!("/dev/vfio/noiommu-{number}"))?;
        let descriptor = container.as_raw_fd();
        // SAFETY: reads one number.
        unsafe {
            ioctl(
                &group,
                VFIO_GROUP_SET_CONTAINER,
                &raw const descriptor as u64,
            )
        }
        .context("VFIO_GROUP_SET_CONTAINER")?;
        // SAFETY: takes a number.
        unsafe { ioctl(&container, VFIO_SET_IOMMU, VFIO_NOIOMMU_IOMMU) }
            .context("VFIO_SET_IOMMU")?;
        let name = CString::new(address).context("an address with a NUL")?;
        // SAFETY: reads a string up to its NUL.
        let device = unsafe { ioctl(&group, VFIO_GROUP_GET_DEVICE_FD, name.as_ptr() as u64) }
            .context("VFIO_GROUP_GET_DEVICE_FD")?;
        // SAFETY: the ioctl returned a new descriptor, which nobody else owns.
        let device = unsafe { OwnedFd::from_raw_fd(device) };
        let open = Self {
            device: device.into(),
            _group: group,
            _container: container,
        };
        open.enable(true)?;
        Ok(open)
    }

    fn start(&self, region: u32) -> Result<u64> {
        dmabuf::region_start(&self.device, region).context(format!("there is no region {region}"))
    }

    /// Lets the device's memory be reached, or not.
    pub fn enable(&self, on: bool) -> Result<()> {
        let at = self.start(CONFIG)? + COMMAND;
        let value = if on { MEMORY } else { 0 };
        let written = self.device.write_all_at(&value.to_le_bytes(), at);
        written.context("cannot write COMMAND")
    }

    /// Resets the function, as its driver would.
    pub fn reset(&self) -> Result<()> {
        // SAFETY: takes no argument.
        unsafe { ioctl(&self.device, VFIO_DEVICE_RESET, 0) }
            .map(drop)
            .context("VFIO_DEVICE_RESET")
    }

    /// A dma-buf of ranges (offset and length) of a BAR.
    pub fn export(&self, bar: u32, ranges: &[(u64, u64)]) -> Result<OwnedFd> {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|&(offset, len)| BarRange { offset, len })
            .collect();
        dmabuf::export(&self.device, bar, &ranges, Access::ReadWrite)
            .map_err(|error| Failure(error_line(&error)))
    }

    /// A part of a BAR, to draw into.
    pub fn map(&self, bar: u32, offset: u64, len: u64) -> Result<Mmio> {
        Mmio::new(&self.device, self.start(bar)? + offset, len)
            .context(format!("cannot map {len:#x} bytes of BAR {bar}"))
    }
}

/// # Safety
/// `argument` is what `request` takes.
unsafe fn ioctl(file: &File, request: u64, argument: u64) -> std::io::Result<i32> {
    // SAFETY: the caller's promise.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request as _, argument) };
    if result < 0 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
