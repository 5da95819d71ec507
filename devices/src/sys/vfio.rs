//! Ioctls on VFIO devices (Linux `include/uapi/linux/vfio.h`), one typed function each: those that
//! vfio-ioctls lacks, or whose errors it drops.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_FEATURE_DMA_BUF, VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_PROBE,
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS,
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_WRITE, VFIO_TYPE, vfio_irq_info,
    vfio_region_info,
};
use vmm_sys_util::{
    eventfd::EventFd,
    ioctl::{ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr},
    ioctl_io_nr,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::ioctl::check;

ioctl_io_nr!(VFIO_DEVICE_GET_REGION_INFO, VFIO_TYPE as u32, VFIO_BASE + 8);
ioctl_io_nr!(VFIO_DEVICE_GET_IRQ_INFO, VFIO_TYPE as u32, VFIO_BASE + 9);
ioctl_io_nr!(VFIO_DEVICE_SET_IRQS, VFIO_TYPE as u32, VFIO_BASE + 10);
ioctl_io_nr!(VFIO_DEVICE_RESET, VFIO_TYPE as u32, VFIO_BASE + 11);
ioctl_io_nr!(VFIO_DEVICE_FEATURE, VFIO_TYPE as u32, VFIO_BASE + 17);

/// A part of a region.
///
/// `struct vfio_region_dma_range`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct BarRange {
    /// Bytes from the region's start, whole pages.
    pub offset: u64,
    /// Length in bytes, whole pages, not zero.
    pub len: u64,
}

/// `struct vfio_irq_set` without its data.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct IrqSet {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
}

fn set_irqs(
    device: &impl AsRawFd,
    flags: u32,
    index: u32,
    start: u32,
    events: &[Option<&EventFd>],
) -> io::Result<()> {
    let set = IrqSet {
        argsz: (size_of::<IrqSet>() + events.len() * size_of::<i32>()) as u32,
        flags,
        index,
        start,
        count: events.len() as u32,
    };
    let mut request = set.as_bytes().to_vec();
    for event in events {
        // -1 takes an event away from its interrupt.
        request.extend(event.map_or(-1, AsRawFd::as_raw_fd).to_ne_bytes());
    }
    // SAFETY: VFIO_DEVICE_SET_IRQS reads `argsz` bytes, which is the length of `request`.
    check(unsafe { ioctl_with_ptr(device, VFIO_DEVICE_SET_IRQS(), request.as_ptr()) }).map(drop)
}

/// Has interrupts from `start` on of kind `index` (`VFIO_PCI_*_IRQ_INDEX`) signal `events`; none for one
/// that is to signal nothing.
pub fn trigger_events(
    device: &impl AsRawFd,
    index: u32,
    start: u32,
    events: &[Option<&EventFd>],
) -> io::Result<()> {
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    set_irqs(device, flags, index, start, events)
}

/// Has a write to `event` unmask the one interrupt of kind `index`.
pub fn unmask_event(device: &impl AsRawFd, index: u32, event: &EventFd) -> io::Result<()> {
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK;
    set_irqs(device, flags, index, 0, &[Some(event)])
}

/// Switches all interrupts of kind `index` off.
pub fn disable_irqs(device: &impl AsRawFd, index: u32) -> io::Result<()> {
    let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
    set_irqs(device, flags, index, 0, &[])
}

/// Resets the function.
pub fn reset(device: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: VFIO_DEVICE_RESET takes no argument.
    check(unsafe { ioctl(device, VFIO_DEVICE_RESET()) }).map(drop)
}

/// A region, as the kernel describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionInfo {
    /// Its number.
    pub index: u32,
    /// Where it is in the device's descriptor.
    pub start: u64,
    /// Size in bytes; 0 if there is none.
    pub size: u64,
    /// Whether it can be written.
    pub writable: bool,
    /// Areas that can be mapped: offset in the region and length.
    pub mappable: Vec<(u64, u64)>,
}

/// Region `index` of a device.
pub fn region(device: &impl AsRawFd, index: u32) -> io::Result<RegionInfo> {
    /// The most that is asked for: a region has a handful of mappable areas.
    const MAX: u32 = 64 << 10;
    let mut len = size_of::<vfio_region_info>() as u32;
    loop {
        let request = RegionHeader {
            argsz: len,
            index,
            ..Default::default()
        };
        let mut answer = request.as_bytes().to_vec();
        answer.resize(len as usize, 0);
        // SAFETY: the kernel writes at most `argsz` bytes, which is the length of `answer`.
        check(unsafe {
            ioctl_with_mut_ptr(device, VFIO_DEVICE_GET_REGION_INFO(), answer.as_mut_ptr())
        })?;
        let (header, _) = RegionHeader::read_from_prefix(&answer)
            .map_err(|_| io::Error::other("the answer is too short"))?;
        if header.argsz > len && header.argsz <= MAX {
            len = header.argsz;
            continue;
        }
        return Ok(parse_region(header, &answer));
    }
}

/// `struct vfio_region_info`.
#[derive(Clone, Copy, Default, IntoBytes, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RegionHeader {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

fn parse_region(header: RegionHeader, answer: &[u8]) -> RegionInfo {
    let capability = (header.flags & VFIO_REGION_INFO_FLAG_CAPS != 0)
        .then(|| capability(answer, header.cap_offset, VFIO_REGION_INFO_CAP_SPARSE_MMAP))
        .flatten();
    let mappable = match capability {
        _ if header.flags & VFIO_REGION_INFO_FLAG_MMAP == 0 => Vec::new(),
        Some(sparse) => {
            // `struct vfio_region_info_cap_sparse_mmap`: a count, and areas from 16 on.
            let count = u32_at(sparse, 8).unwrap_or(0) as usize;
            let areas = sparse.get(16..).unwrap_or_default().chunks_exact(16);
            let areas = areas.take(count).filter_map(|bytes| {
                let [offset, size] = <[u64; 2]>::read_from_bytes(bytes).ok()?;
                Some((offset, size))
            });
            areas.collect()
        }
        None => vec![(0, header.size)],
    };
    RegionInfo {
        index: header.index,
        start: header.offset,
        size: header.size,
        writable: header.flags & VFIO_REGION_INFO_FLAG_WRITE != 0,
        mappable,
    }
}

/// `VFIO_IRQ_INFO_*` of interrupts of kind `index`, and how many there are.
pub fn irq_info(device: &impl AsRawFd, index: u32) -> io::Result<(u32, u32)> {
    let mut info = vfio_irq_info {
        argsz: size_of::<vfio_irq_info>() as u32,
        index,
        ..Default::default()
    };
    // SAFETY: the kernel writes one `vfio_irq_info`, as `argsz` says.
    check(unsafe { ioctl_with_mut_ref(device, VFIO_DEVICE_GET_IRQ_INFO(), &mut info) })?;
    Ok((info.flags, info.count))
}

/// `struct vfio_device_feature` without its data.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Feature {
    argsz: u32,
    flags: u32,
}

/// [`Feature`] with `struct vfio_device_feature_dma_buf`, without its ranges.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct FeatureDmaBuf {
    feature: Feature,
    region_index: u32,
    open_flags: u32,
    flags: u32,
    nr_ranges: u32,
}

/// Whether the kernel and the device's driver can export dma-bufs. A driver that cannot gives an error,
/// as does a kernel that knows no such feature.
pub fn probe_dma_buf(device: &impl AsRawFd) -> io::Result<()> {
    let feature = Feature {
        argsz: size_of::<Feature>() as u32,
        flags: VFIO_DEVICE_FEATURE_PROBE | VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_BUF,
    };
    // SAFETY: a probe reads the header only, which `argsz` says is all there is.
    check(unsafe { ioctl_with_ptr(device, VFIO_DEVICE_FEATURE(), &feature) }).map(drop)
}

/// A dma-buf of `ranges` of region `region`, one behind the other.
/// `open_flags` is `O_RDONLY` or `O_RDWR`.
pub fn export_dma_buf(
    device: &impl AsRawFd,
    region: u32,
    ranges: impl ExactSizeIterator<Item = BarRange>,
    open_flags: libc::c_int,
) -> io::Result<OwnedFd> {
    const HEADER: usize = size_of::<FeatureDmaBuf>() / size_of::<u64>();
    const RANGE: usize = size_of::<BarRange>() / size_of::<u64>();
    let mut request = vec![0u64; HEADER + ranges.len() * RANGE];
    let header = FeatureDmaBuf {
        feature: Feature {
            argsz: size_of_val(&request[..]) as u32,
            flags: VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_BUF,
        },
        region_index: region,
        open_flags: (open_flags | libc::O_CLOEXEC) as u32,
        flags: 0,
        nr_ranges: ranges.len() as u32,
    };
    let (first, rest) = request.split_at_mut(HEADER);
    first.as_mut_bytes().copy_from_slice(header.as_bytes());
    for (words, range) in rest.as_chunks_mut::<RANGE>().0.iter_mut().zip(ranges) {
        *words = [range.offset, range.len];
    }
    // SAFETY: the kernel reads `argsz` bytes, which is the length of `request`.
    let fd =
        check(unsafe { ioctl_with_mut_ptr(device, VFIO_DEVICE_FEATURE(), request.as_mut_ptr()) })?;
    // SAFETY: the ioctl returned a new descriptor; no other owner exists.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?.try_into().ok()?;
    Some(u32::from_ne_bytes(bytes))
}

/// The capability of this kind, from its header to the end of the answer, in the chain of
/// `struct vfio_info_cap_header` that starts at `first`.
pub(super) fn capability(answer: &[u8], first: u32, id: u32) -> Option<&[u8]> {
    let mut at = first as usize;
    // The kernel makes the chain; it is bounded all the same.
    for _ in 0..16 {
        if at == 0 {
            break;
        }
        let here = answer.get(at..)?;
        if u32_at(here, 0)? & 0xffff == id {
            return Some(here);
        }
        at = u32_at(here, 4)? as usize;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_as_large_as_the_kernels() {
        assert_eq!(size_of::<IrqSet>(), 20);
        assert_eq!(size_of::<Feature>(), 8);
        assert_eq!(size_of::<RegionHeader>(), size_of::<vfio_region_info>());
        assert_eq!(size_of::<FeatureDmaBuf>(), 24);
        assert_eq!(size_of::<BarRange>(), 16);
    }

    #[test]
    fn a_region_is_mappable_where_it_says() {
        let header = RegionHeader {
            flags: VFIO_REGION_INFO_FLAG_CAPS | VFIO_REGION_INFO_FLAG_MMAP,
            index: 4,
            cap_offset: 32,
            size: 0x4000,
            offset: 4 << 40,
            ..Default::default()
        };
        let mut answer = header.as_bytes().to_vec();
        for word in [3u32 | 1 << 16, 40, 1 | 1 << 16, 0, 2, 0] {
            answer.extend(word.to_ne_bytes());
        }
        for word in [0u64, 0x1000, 0x2000, 0x2000] {
            answer.extend(word.to_ne_bytes());
        }
        let region = parse_region(header, &answer);
        assert_eq!(region.mappable, [(0, 0x1000), (0x2000, 0x2000)]);
        assert_eq!((region.start, region.size), (4 << 40, 0x4000));
        let cut = parse_region(header, &answer[..80]);
        assert_eq!(cut.mappable, [(0, 0x1000)]);
        let plain = RegionHeader {
            flags: VFIO_REGION_INFO_FLAG_MMAP,
            ..header
        };
        assert_eq!(parse_region(plain, &answer).mappable, [(0, 0x4000)]);
        let unmappable = RegionHeader { flags: 0, ..header };
        assert_eq!(parse_region(unmappable, &answer).mappable, []);
    }
}
