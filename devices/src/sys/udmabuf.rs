//! The ioctl that makes a dma-buf of pages of memfds (Linux `include/uapi/linux/udmabuf.h`).

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::Arc,
};

use vmm_sys_util::{ioctl::ioctl_with_ptr, ioctl_iow_nr};
use zerocopy::{Immutable, IntoBytes};

use super::ioctl::check;

const UDMABUF_FLAGS_CLOEXEC: u32 = 1;

/// `struct udmabuf_create_list` without its list.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct UdmabufCreateList {
    flags: u32,
    count: u32,
}

/// `struct udmabuf_create_item`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct UdmabufCreateItem {
    memfd: u32,
    pad: u32,
    offset: u64,
    size: u64,
}

ioctl_iow_nr!(UDMABUF_CREATE_LIST, b'u' as u32, 0x43, UdmabufCreateList);

/// A range of a memfd that is sealed against shrinking, page aligned.
#[derive(Debug)]
pub struct UdmabufItem<'a> {
    file: &'a Arc<File>,
    offset: u64,
    /// Length in bytes.
    pub size: u64,
}

impl<'a> UdmabufItem<'a> {
    /// `size` bytes of `file` from `offset` on.
    pub fn new(file: &'a Arc<File>, offset: u64, size: u64) -> Self {
        Self { file, offset, size }
    }
}

/// Makes a dma-buf of `items`, in their order. Their pages stay in memory until its last descriptor is
/// closed (`UDMABUF_CREATE_LIST`).
pub fn create_list(device: &File, items: &[UdmabufItem]) -> io::Result<OwnedFd> {
    let words = words(items);
    // SAFETY: `words` is a `udmabuf_create_list` with as many items behind it as it says, which the
    // kernel only reads.
    let fd = check(unsafe { ioctl_with_ptr(device, UDMABUF_CREATE_LIST(), words.as_ptr()) })?;
    // SAFETY: the kernel just made the descriptor for this call; no other owner exists.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The ioctl's argument, aligned as its largest field.
fn words(items: &[UdmabufItem]) -> Vec<u64> {
    let head = UdmabufCreateList {
        flags: UDMABUF_FLAGS_CLOEXEC,
        count: items.len() as u32,
    };
    let mut words: Vec<u64> = Vec::new();
    let mut add = |bytes: &[u8]| {
        let (chunks, _) = bytes.as_chunks();
        words.extend(chunks.iter().copied().map(u64::from_ne_bytes));
    };
    add(head.as_bytes());
    for item in items {
        let item = UdmabufCreateItem {
            memfd: item.file.as_raw_fd() as u32,
            pad: 0,
            offset: item.offset,
            size: item.size,
        };
        add(item.as_bytes());
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_argument_is_laid_out_as_the_kernel_reads_it() {
        assert_eq!(UDMABUF_CREATE_LIST(), 0x4008_7543);
        assert_eq!(size_of::<UdmabufCreateList>(), 8);
        assert_eq!(size_of::<UdmabufCreateItem>(), 24);
        let file = Arc::new(tempfile::tempfile().unwrap());
        let items = [
            UdmabufItem::new(&file, 0x1000, 0x2000),
            UdmabufItem::new(&file, 0x8000, 0x1000),
        ];
        let fd = file.as_raw_fd() as u64;
        assert_eq!(
            words(&items),
            [1 | 2 << 32, fd, 0x1000, 0x2000, fd, 0x8000, 0x1000]
        );
    }
}
