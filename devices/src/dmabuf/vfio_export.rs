//! Memory of a passed-through device as a dma-buf, which another device imports to reach it without a copy
//! (`VFIO_DEVICE_FEATURE_DMA_BUF`, Linux `drivers/vfio/pci/vfio_pci_dmabuf.c`).
//!
//! The processor cannot map such a dma-buf; it maps the descriptor of the device. While the memory of the device is
//! off (COMMAND, D3, reset) the dma-buf is revoked. It works again afterwards.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use fanlight_arch::layout::PAGE_SIZE;
use thiserror::Error;

use crate::sys::vfio as ioctls;

pub use crate::sys::vfio::BarRange;

/// The most ranges of one dma-buf: a 16K screen in single pages. Each costs the kernel 24 bytes that are not
/// accounted for.
const MAX_RANGES: usize = 1 << 18;

/// Whether an importer may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only read.
    ReadOnly,
    /// Read and write.
    ReadWrite,
}

/// Why there is no dma-buf. [`DmaBufError::is_guest_mistake`] separates requests of the guest from failures of the
/// host.
#[derive(Debug, Error)]
pub enum DmaBufError {
    /// Nothing to export.
    #[error("a dma-buf of no bytes")]
    Empty,
    /// More ranges than are taken.
    #[error("a dma-buf of {0} ranges: at most {MAX_RANGES} are taken")]
    TooMany(usize),
    /// Not whole pages.
    #[error("{:#x} bytes at offset {:#x} of BAR {region} are not whole pages", range.len, range.offset)]
    Unaligned {
        /// The region.
        region: u32,
        /// What was asked for.
        range: BarRange,
    },
    /// Past the end.
    #[error(
        "{:#x} bytes at offset {:#x} pass the end of BAR {region}, which has {size:#x}",
        range.len,
        range.offset
    )]
    OutOfBounds {
        /// The region.
        region: u32,
        /// What was asked for.
        range: BarRange,
        /// The region's size in bytes.
        size: u64,
    },
    /// Not memory.
    #[error("BAR {0} is not memory that can be exported")]
    NotMemory(u32),
    /// The host's kernel has no such feature.
    #[error(
        "the host's kernel cannot export device memory as a dma-buf: it needs Linux 6.19 or later with \
         CONFIG_VFIO_PCI_DMABUF"
    )]
    NoKernelSupport,
    /// The device's driver cannot.
    #[error(
        "the device's driver cannot export its memory: bind the device to vfio-pci itself, not to a variant \
         of it"
    )]
    NoDriverSupport,
    /// Another failure of the host.
    #[error("the host cannot export {ranges} ranges of BAR {region} as a dma-buf")]
    Host {
        /// The region.
        region: u32,
        /// How many ranges.
        ranges: usize,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl DmaBufError {
    /// Whether the request is invalid, and not the host unable to serve it.
    pub fn is_guest_mistake(&self) -> bool {
        match self {
            DmaBufError::Empty
            | DmaBufError::TooMany(_)
            | DmaBufError::Unaligned { .. }
            | DmaBufError::OutOfBounds { .. }
            | DmaBufError::NotMemory(_) => true,
            DmaBufError::NoKernelSupport
            | DmaBufError::NoDriverSupport
            | DmaBufError::Host { .. } => false,
        }
    }
}

/// Where region `region` starts in the descriptor of its device. The offset of a `Backing` minus this is the offset
/// in the region.
pub fn region_start(device: &impl AsRawFd, region: u32) -> io::Result<u64> {
    ioctls::region(device, region).map(|region| region.start)
}

/// Whether this kernel can export memory of this device.
pub fn probe(device: &impl AsRawFd) -> Result<(), DmaBufError> {
    ioctls::probe_dma_buf(device).map_err(|source| support_error(source, 0, 0))
}

/// One dma-buf of all `ranges` of region `region` (0 to 5), in their order.
pub fn export(
    device: &impl AsRawFd,
    region: u32,
    ranges: &[BarRange],
    access: Access,
) -> Result<OwnedFd, DmaBufError> {
    export_each(device, region, ranges.iter().copied(), access)
}

/// The same for ranges from an iterator.
pub fn export_each(
    device: &impl AsRawFd,
    region: u32,
    ranges: impl ExactSizeIterator<Item = BarRange> + Clone,
    access: Access,
) -> Result<OwnedFd, DmaBufError> {
    /// The expansion ROM and the regions behind it are no BARs.
    const BARS: u32 = 6;
    let count = ranges.len();
    if count == 0 {
        return Err(DmaBufError::Empty);
    }
    if count > MAX_RANGES {
        return Err(DmaBufError::TooMany(count));
    }
    if region >= BARS {
        return Err(DmaBufError::NotMemory(region));
    }
    let flags = match access {
        Access::ReadOnly => libc::O_RDONLY,
        Access::ReadWrite => libc::O_RDWR,
    };
    ioctls::export_dma_buf(device, region, ranges.clone(), flags)
        .map_err(|source| explain(device, region, ranges, source))
}

/// The kernel makes the same checks as [`check_range`] and returns one error for all. The cause is found here,
/// after a refusal.
fn explain(
    device: &impl AsRawFd,
    region: u32,
    mut ranges: impl ExactSizeIterator<Item = BarRange>,
    source: io::Error,
) -> DmaBufError {
    let count = ranges.len();
    let size = match ioctls::region(device, region) {
        Ok(info) => info.size,
        Err(source) => {
            return DmaBufError::Host {
                region,
                ranges: count,
                source,
            };
        }
    };
    let wrong = ranges.find_map(|range| check_range(region, size, range).err());
    wrong.unwrap_or_else(|| support_error(source, region, count))
}

fn check_range(region: u32, size: u64, range: BarRange) -> Result<(), DmaBufError> {
    let whole = |value: u64| value.is_multiple_of(PAGE_SIZE);
    if range.len == 0 || !whole(range.offset) || !whole(range.len) {
        return Err(DmaBufError::Unaligned { region, range });
    }
    let end = range.offset.checked_add(range.len);
    if end.is_none_or(|end| end > size) {
        return Err(DmaBufError::OutOfBounds {
            region,
            range,
            size,
        });
    }
    Ok(())
}

/// What the kernel means by its error, for a request whose ranges are known to be right.
fn support_error(source: io::Error, region: u32, ranges: usize) -> DmaBufError {
    match source.raw_os_error() {
        Some(libc::ENOTTY) => DmaBufError::NoKernelSupport,
        Some(libc::EOPNOTSUPP) => DmaBufError::NoDriverSupport,
        // The region exists and is a BAR: it decodes ports, or its memory could not be claimed.
        Some(libc::EINVAL | libc::ENODEV) => DmaBufError::NotMemory(region),
        _ => DmaBufError::Host {
            region,
            ranges,
            source,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(size: u64, offset: u64, len: u64) -> Result<(), DmaBufError> {
        check_range(2, size, BarRange { offset, len })
    }

    #[test]
    fn ranges_are_whole_pages_within_the_region() {
        assert!(check(0x4000, 0, 0x4000).is_ok());
        assert!(check(0x4000, 0x3000, 0x1000).is_ok());
        for (offset, len) in [(0, 0), (0x10, 0x1000), (0, 0x1001)] {
            let error = check(0x4000, offset, len).unwrap_err();
            assert!(matches!(error, DmaBufError::Unaligned { .. }), "{error}");
        }
        for (offset, len) in [(0, 0x5000), (0x4000, 0x1000), (!0xfff, 0x1000)] {
            let error = check(0x4000, offset, len).unwrap_err();
            assert!(error.is_guest_mistake(), "{error}");
            assert!(matches!(error, DmaBufError::OutOfBounds { .. }), "{error}");
        }
    }

    #[test]
    fn whose_fault_it_is_follows_from_the_kernels_answer() {
        let error = |number| support_error(io::Error::from_raw_os_error(number), 1, 1);
        assert!(!error(libc::ENOTTY).is_guest_mistake());
        assert!(!error(libc::EOPNOTSUPP).is_guest_mistake());
        assert!(!error(libc::ENOMEM).is_guest_mistake());
        assert!(error(libc::ENODEV).is_guest_mistake());
    }

    #[test]
    fn what_is_no_device_is_the_hosts_failure() {
        let file = tempfile::tempfile().unwrap();
        let range = BarRange {
            offset: 0,
            len: 0x1000,
        };
        let error = export(&file, 0, &[range], Access::ReadOnly).unwrap_err();
        assert!(!error.is_guest_mistake(), "{error}");
        let error = export(&file, 6, &[range], Access::ReadOnly).unwrap_err();
        assert!(error.is_guest_mistake(), "{error}");
        assert!(matches!(
            export(&file, 0, &[], Access::ReadOnly),
            Err(DmaBufError::Empty)
        ));
    }
}
