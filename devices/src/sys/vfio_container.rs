//! Ioctls on VFIO containers and groups, one typed function each (Linux `include/uapi/linux/vfio.h`). vfio-ioctls
//! has them only for nodes that it opens itself.

use std::{
    ffi::CStr,
    fs::File,
    io,
    ops::RangeInclusive,
    os::fd::{AsRawFd, FromRawFd},
};

use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_BASE, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE,
    VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_TYPE, VFIO_TYPE1v2_IOMMU,
    vfio_group_status, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
};
use vmm_sys_util::{
    ioctl::{
        ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref,
        ioctl_with_val,
    },
    ioctl_io_nr,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{
    ioctl::check,
    iova_range::{IovaRange, MAX_IOVA_RANGES},
    vfio::{capability, u32_at},
};

ioctl_io_nr!(VFIO_GET_API_VERSION, VFIO_TYPE as u32, VFIO_BASE);
ioctl_io_nr!(VFIO_CHECK_EXTENSION, VFIO_TYPE as u32, VFIO_BASE + 1);
ioctl_io_nr!(VFIO_SET_IOMMU, VFIO_TYPE as u32, VFIO_BASE + 2);
ioctl_io_nr!(VFIO_GROUP_GET_STATUS, VFIO_TYPE as u32, VFIO_BASE + 3);
ioctl_io_nr!(VFIO_GROUP_SET_CONTAINER, VFIO_TYPE as u32, VFIO_BASE + 4);
ioctl_io_nr!(VFIO_GROUP_UNSET_CONTAINER, VFIO_TYPE as u32, VFIO_BASE + 5);
ioctl_io_nr!(VFIO_GROUP_GET_DEVICE_FD, VFIO_TYPE as u32, VFIO_BASE + 6);
ioctl_io_nr!(VFIO_IOMMU_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 12);
ioctl_io_nr!(VFIO_IOMMU_MAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 13);
ioctl_io_nr!(VFIO_IOMMU_UNMAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 14);

/// Whether the file is a container of the type that is used (VFIO_TYPE1v2_IOMMU). Other files give an error.
pub fn is_container(file: &File) -> io::Result<bool> {
    // SAFETY: VFIO_GET_API_VERSION takes no argument.
    let version = check(unsafe { ioctl(file, VFIO_GET_API_VERSION()) })?;
    // SAFETY: VFIO_CHECK_EXTENSION takes a number.
    let has_type1 =
        check(unsafe { ioctl_with_val(file, VFIO_CHECK_EXTENSION(), VFIO_TYPE1v2_IOMMU.into()) })?;
    Ok(version as u32 == VFIO_API_VERSION && has_type1 == 1)
}

/// Enables translation for the groups of a container.
pub fn set_iommu(container: &File) -> io::Result<()> {
    // SAFETY: VFIO_SET_IOMMU takes a number.
    check(unsafe { ioctl_with_val(container, VFIO_SET_IOMMU(), VFIO_TYPE1v2_IOMMU.into()) })
        .map(drop)
}

/// `struct vfio_iommu_type1_info`.
#[derive(Clone, Copy, Default, IntoBytes, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Type1Info {
    argsz: u32,
    flags: u32,
    iova_pgsizes: u64,
    cap_offset: u32,
    pad: u32,
}

/// The addresses that a container can map, with the groups that it has now. Empty if the kernel does not list them.
pub fn iova_ranges(container: &File) -> io::Result<Vec<RangeInclusive<u64>>> {
    const LEN: usize = size_of::<Type1Info>() + MAX_IOVA_RANGES * size_of::<IovaRange>();
    let info = Type1Info {
        argsz: LEN as u32,
        ..Default::default()
    };
    let mut answer = info.as_bytes().to_vec();
    answer.resize(LEN, 0);
    // SAFETY: the kernel writes at most `argsz` bytes, which is the length of `answer`.
    check(unsafe { ioctl_with_mut_ptr(container, VFIO_IOMMU_GET_INFO(), answer.as_mut_ptr()) })?;
    Ok(parse_type1_info(&answer))
}

/// The ranges of the capability of that kind in a chain of `struct vfio_info_cap_header`.
fn parse_type1_info(answer: &[u8]) -> Vec<RangeInclusive<u64>> {
    /// `struct vfio_iommu_type1_info_cap_iova_range`: where the ranges start.
    const RANGES: usize = 16;
    let Ok((info, _)) = Type1Info::read_from_prefix(answer) else {
        return Vec::new();
    };
    if info.flags & VFIO_IOMMU_INFO_CAPS == 0 {
        return Vec::new();
    }
    let Some(found) = capability(
        answer,
        info.cap_offset,
        VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    ) else {
        return Vec::new();
    };
    let count = u32_at(found, 8).unwrap_or(0) as usize;
    let ranges = found.get(RANGES..).unwrap_or_default();
    ranges
        .chunks_exact(size_of::<IovaRange>())
        .take(count)
        .filter_map(|bytes| IovaRange::read_from_bytes(bytes).ok())
        .map(Into::into)
        .collect()
}

/// Maps `size` bytes at `host` for devices at `iova`.
///
/// # Safety
/// Devices write there until it is unmapped: no references into it may exist.
pub unsafe fn map(container: &File, iova: u64, size: u64, host: *mut u8) -> io::Result<()> {
    let request = vfio_iommu_type1_dma_map {
        argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
        flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        vaddr: host.expose_provenance() as u64,
        iova,
        size,
    };
    // SAFETY: the kernel reads one request, as `argsz` says; what is mapped is the caller's promise.
    check(unsafe { ioctl_with_ref(container, VFIO_IOMMU_MAP_DMA(), &request) }).map(drop)
}

/// Unmaps a range, and returns how many bytes were mapped.
pub fn unmap(container: &File, iova: u64, size: u64) -> io::Result<u64> {
    let mut request = vfio_iommu_type1_dma_unmap {
        argsz: size_of::<vfio_iommu_type1_dma_unmap>() as u32,
        iova,
        size,
        ..Default::default()
    };
    // SAFETY: the kernel reads and writes one request, as `argsz` says.
    check(unsafe { ioctl_with_mut_ref(container, VFIO_IOMMU_UNMAP_DMA(), &mut request) })?;
    Ok(request.size)
}

/// `VFIO_GROUP_FLAGS_*` of a group. Other files give an error.
pub fn group_flags(group: &File) -> io::Result<u32> {
    let mut status = vfio_group_status {
        argsz: size_of::<vfio_group_status>() as u32,
        flags: 0,
    };
    // SAFETY: the kernel writes one status, as `argsz` says.
    check(unsafe { ioctl_with_mut_ref(group, VFIO_GROUP_GET_STATUS(), &mut status) })?;
    Ok(status.flags)
}

/// Puts a group into a container.
pub fn set_container(group: &File, container: &File) -> io::Result<()> {
    let number = container.as_raw_fd();
    // SAFETY: the kernel reads a descriptor's number.
    check(unsafe { ioctl_with_ref(group, VFIO_GROUP_SET_CONTAINER(), &number) }).map(drop)
}

/// Removes a group from its container. None of its devices may be open.
pub fn unset_container(group: &File) -> io::Result<()> {
    // SAFETY: VFIO_GROUP_UNSET_CONTAINER takes no argument.
    check(unsafe { ioctl(group, VFIO_GROUP_UNSET_CONTAINER()) }).map(drop)
}

/// Opens the device of this name in a group that is in a container.
pub fn device_of(group: &File, name: &CStr) -> io::Result<File> {
    // SAFETY: the kernel reads a string that ends.
    let device =
        check(unsafe { ioctl_with_ptr(group, VFIO_GROUP_GET_DEVICE_FD(), name.as_ptr()) })?;
    // SAFETY: the ioctl returned a new descriptor; no other owner exists.
    Ok(unsafe { File::from_raw_fd(device) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_as_large_as_the_kernels() {
        assert_eq!(size_of::<Type1Info>(), 24);
    }

    #[test]
    fn ranges_are_found_behind_other_capabilities() {
        let info = Type1Info {
            flags: VFIO_IOMMU_INFO_CAPS,
            cap_offset: 24,
            ..Default::default()
        };
        let mut answer = info.as_bytes().to_vec();
        for word in [3u32 | 1 << 16, 32, 1 | 1 << 16, 0, 2, 0] {
            answer.extend(word.to_ne_bytes());
        }
        for word in [0, 0xfedf_ffff, 0xfef0_0000, u64::MAX >> 16] {
            answer.extend(word.to_ne_bytes());
        }
        assert_eq!(
            parse_type1_info(&answer),
            [0..=0xfedf_ffff, 0xfef0_0000..=u64::MAX >> 16]
        );
        assert_eq!(parse_type1_info(&answer[..50]), []);
        assert_eq!(parse_type1_info(&[]), []);
    }
}
