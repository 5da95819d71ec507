//! Ioctls on iommufd (Linux `include/uapi/linux/iommufd.h`) that iommufd-ioctls lacks.

use std::{io, ops::RangeInclusive, os::fd::AsRawFd};

use vfio_bindings::bindings::vfio::VFIO_TYPE;
use vmm_sys_util::{ioctl::ioctl_with_mut_ref, ioctl_io_nr};
use zerocopy::{Immutable, IntoBytes};

use super::{
    ioctl::check,
    iova_range::{IovaRange, MAX_IOVA_RANGES},
};

ioctl_io_nr!(IOMMU_IOAS_IOVA_RANGES, VFIO_TYPE as u32, 0x84);

/// `struct iommu_ioas_iova_ranges`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct IovaRanges {
    size: u32,
    ioas_id: u32,
    num_iovas: u32,
    reserved: u32,
    allowed_iovas: u64,
    out_iova_alignment: u64,
}

/// The addresses that an I/O address space of iommufd can map, with the devices that it has now.
pub fn ioas_iova_ranges(iommufd: &impl AsRawFd, ioas: u32) -> io::Result<Vec<RangeInclusive<u64>>> {
    let mut ranges = vec![IovaRange::default(); MAX_IOVA_RANGES];
    let mut request = IovaRanges {
        size: size_of::<IovaRanges>() as u32,
        ioas_id: ioas,
        num_iovas: ranges.len() as u32,
        reserved: 0,
        allowed_iovas: ranges.as_mut_ptr().addr() as u64,
        out_iova_alignment: 0,
    };
    ranges.as_mut_ptr().expose_provenance();
    // SAFETY: the kernel writes the request, as `size` says, and at most `num_iovas` ranges to where it
    // points, which is `ranges`.
    check(unsafe { ioctl_with_mut_ref(iommufd, IOMMU_IOAS_IOVA_RANGES(), &mut request) })?;
    ranges.truncate(request.num_iovas as usize);
    Ok(ranges.into_iter().map(Into::into).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_as_large_as_the_kernels() {
        assert_eq!(size_of::<IovaRanges>(), 32);
    }
}
