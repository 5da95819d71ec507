//! A device in a guest's own vfio-pci, without an IOMMU: user space accesses to a passed-through device's memory (Linux
//! `Documentation/driver-api/vfio.rst`).

use std::{
    ffi::CString,
    fs::{self, File},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use fanlight_devices::{
    dmabuf::vfio_export::{self, Access, BarRange},
    error_line,
    vfio::sysfs::VFIO_PCI,
};

use rustix::event::{EventfdFlags, eventfd};

use crate::{
    Context, Failure, Result,
    common::pci::{Function, Mmio},
};

const VFIO_SET_IOMMU: u64 = 0x3b66;
const VFIO_GROUP_SET_CONTAINER: u64 = 0x3b68;
const VFIO_GROUP_GET_DEVICE_FD: u64 = 0x3b6a;
const VFIO_DEVICE_SET_IRQS: u64 = 0x3b6e;
const VFIO_DEVICE_RESET: u64 = 0x3b6f;
const VFIO_NOIOMMU_IOMMU: u64 = 8;
/// VFIO's index of configuration space.
const CONFIG: u32 = 7;
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 0b110;

/// Uses of VFIO_DEVICE_SET_IRQS: sets the eventfd of an interrupt, or unmasks INTx.
const HEAR: u32 = DATA_EVENTFD | ACTION_TRIGGER;
const UNMASK: u32 = DATA_NONE | ACTION_UNMASK;
const DATA_NONE: u32 = 1;
const DATA_EVENTFD: u32 = 1 << 2;
const ACTION_UNMASK: u32 = 1 << 4;
const ACTION_TRIGGER: u32 = 1 << 5;

/// Interrupt kinds, by VFIO's index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Interrupt {
    /// INTx, which vfio-pci masks after each interrupt.
    Intx = 0,
    /// A message (MSI).
    Msi = 1,
}

/// An open device.
#[derive(Debug)]
pub struct NoIommu {
    device: File,
    _group: File,
    _container: File,
}

impl NoIommu {
    /// Unbinds a function from its driver, and opens it.
    pub fn open(function: &Function) -> Result<Self> {
        let address = function.address();
        let write = |path: &str, text: &str| {
            fs::write(path, text).context(format!("cannot write {text:?} to {path}"))
        };
        write(
            &format!("{}/driver_override", function.path().display()),
            VFIO_PCI,
        )?;
        if function.driver().is_some_and(|driver| driver != VFIO_PCI) {
            function.unbind()?;
        }
        if function.driver().is_none() {
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
        // SAFETY: the ioctl reads one number.
        unsafe {
            ioctl(
                &group,
                VFIO_GROUP_SET_CONTAINER,
                &raw const descriptor as u64,
            )
        }
        .context("VFIO_GROUP_SET_CONTAINER")?;
        // SAFETY: the ioctl takes a number.
        unsafe { ioctl(&container, VFIO_SET_IOMMU, VFIO_NOIOMMU_IOMMU) }
            .context("VFIO_SET_IOMMU")?;
        let name = CString::new(address).context("an address with a NUL")?;
        // SAFETY: the ioctl reads a string up to its NUL.
        let device = unsafe { ioctl(&group, VFIO_GROUP_GET_DEVICE_FD, name.as_ptr() as u64) }
            .context("VFIO_GROUP_GET_DEVICE_FD")?;
        // SAFETY: the ioctl returned a new descriptor, and no other owner exists.
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
        vfio_export::region_start(&self.device, region)
            .context(format!("there is no region {region}"))
    }

    /// Switches memory decoding and bus mastering on or off.
    pub fn enable(&self, on: bool) -> Result<()> {
        let at = self.start(CONFIG)? + COMMAND;
        let value = if on { MEMORY_AND_MASTER } else { 0 };
        let written = self.device.write_all_at(&value.to_le_bytes(), at);
        written.context("cannot write COMMAND")
    }

    /// Resets the function, as its driver would.
    pub fn reset(&self) -> Result<()> {
        // SAFETY: the ioctl takes no argument.
        unsafe { ioctl(&self.device, VFIO_DEVICE_RESET, 0) }
            .map(drop)
            .context("VFIO_DEVICE_RESET")
    }

    /// Exports ranges (offset and length) of a BAR as a dma-buf.
    pub fn export(&self, bar: u32, ranges: &[(u64, u64)]) -> Result<OwnedFd> {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|&(offset, len)| BarRange { offset, len })
            .collect();
        vfio_export::export(&self.device, bar, &ranges, Access::ReadWrite)
            .map_err(|error| Failure(error_line(&error)))
    }

    /// An eventfd that counts the device's interrupts of a kind; of several vectors, the first.
    pub fn hear(&self, kind: Interrupt) -> Result<OwnedFd> {
        let heard = eventfd(0, EventfdFlags::CLOEXEC).context("cannot make an eventfd")?;
        self.set_interrupts(kind, HEAR, Some(heard.as_raw_fd()))?;
        Ok(heard)
    }

    /// Unmasks the device's INTx.
    pub fn unmask(&self) -> Result<()> {
        self.set_interrupts(Interrupt::Intx, UNMASK, None)
    }

    fn set_interrupts(&self, kind: Interrupt, action: u32, heard: Option<i32>) -> Result<()> {
        let (start, count) = (0, 1);
        let mut words = vec![0, action, kind as u32, start, count];
        words.extend(heard.map(|fd| fd as u32));
        words[0] = (words.len() * size_of::<u32>()) as u32;
        // SAFETY: the kernel reads the length in the first word, which is the array's.
        unsafe { ioctl(&self.device, VFIO_DEVICE_SET_IRQS, words.as_ptr() as u64) }
            .map(drop)
            .context(format!("VFIO_DEVICE_SET_IRQS, {kind:?}"))
    }

    /// Maps a part of a BAR.
    pub fn map(&self, bar: u32, offset: u64, len: u64) -> Result<Mmio> {
        Mmio::new(&self.device, self.start(bar)? + offset, len)
            .context(format!("cannot map {len:#x} bytes of BAR {bar}"))
    }
}

/// # Safety
/// `argument` is of the type that `request` takes.
unsafe fn ioctl(file: &File, request: u64, argument: u64) -> std::io::Result<i32> {
    // SAFETY: the caller guarantees the argument.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request as _, argument) };
    if result < 0 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
