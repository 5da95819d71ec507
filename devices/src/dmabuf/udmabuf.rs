//! Linux's udmabuf: a dma-buf out of pages of memfds (`include/uapi/linux/udmabuf.h`,
//! `drivers/dma-buf/udmabuf.c`).

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::Arc,
};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};
use thiserror::Error;
use vmm_sys_util::{ioctl::ioctl_with_ptr, ioctl_iow_nr};
use zerocopy::{Immutable, IntoBytes};

const DEVICE: &str = "/dev/udmabuf";
const PARAMETERS: &str = "/sys/module/udmabuf/parameters";
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

/// Why udmabuf makes no dma-buf.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum UdmabufError {
    /// The device cannot be opened.
    #[error(
        "cannot open {DEVICE}; load the module udmabuf and give this user access to the device"
    )]
    Open(#[source] Errno),
    /// More pieces than the kernel takes.
    #[error("{count} pieces of memory, and udmabuf takes {limit}; raise {PARAMETERS}/list_limit")]
    TooManyPieces {
        /// Pieces, adjacent ones merged.
        count: usize,
        /// `list_limit`.
        limit: u64,
    },
    /// More memory than the kernel takes.
    #[error(
        "{} MiB, and udmabuf takes {limit_mb}; raise {PARAMETERS}/size_limit_mb",
        size.div_ceil(1 << 20)
    )]
    TooLarge {
        /// Bytes asked for.
        size: u64,
        /// `size_limit_mb`.
        limit_mb: u64,
    },
    /// The kernel refused.
    #[error("udmabuf refused {count} pieces of {size:#x} bytes")]
    Refused {
        /// Pieces.
        count: usize,
        /// Bytes.
        size: u64,
        /// The cause.
        #[source]
        source: Errno,
    },
}

/// A range of a memfd that is sealed against shrinking, page aligned.
#[derive(Debug)]
pub struct UdmabufItem<'a> {
    file: &'a Arc<File>,
    offset: u64,
    size: u64,
}

impl<'a> UdmabufItem<'a> {
    /// `size` bytes of `file` from `offset` on.
    pub fn new(file: &'a Arc<File>, offset: u64, size: u64) -> Self {
        Self { file, offset, size }
    }
}

/// What the kernel takes for one dma-buf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Pieces (`list_limit`).
    pub list_limit: u64,
    /// Mebibytes (`size_limit_mb`).
    pub size_limit_mb: u64,
}

impl Limits {
    /// What Linux has before somebody raises it.
    const DEFAULT: Self = Self {
        list_limit: 1024,
        size_limit_mb: 64,
    };

    /// The module's parameters.
    fn read() -> Self {
        let parameter = |name: &str| {
            std::fs::read_to_string(format!("{PARAMETERS}/{name}"))
                .ok()?
                .trim()
                .parse()
                .ok()
        };
        Self {
            list_limit: parameter("list_limit").unwrap_or(Self::DEFAULT.list_limit),
            size_limit_mb: parameter("size_limit_mb").unwrap_or(Self::DEFAULT.size_limit_mb),
        }
    }

    fn check(&self, count: usize, size: u64) -> Result<(), UdmabufError> {
        if count as u64 > self.list_limit {
            return Err(UdmabufError::TooManyPieces {
                count,
                limit: self.list_limit,
            });
        }
        if size > self.size_limit_mb.saturating_mul(1 << 20) {
            return Err(UdmabufError::TooLarge {
                size,
                limit_mb: self.size_limit_mb,
            });
        }
        Ok(())
    }
}

/// The open device.
#[derive(Debug)]
pub struct Udmabuf {
    device: File,
    limits: Limits,
}

impl Udmabuf {
    /// Opens the device and reads its limits.
    pub fn open() -> Result<Self, UdmabufError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let device = rustix::fs::open(DEVICE, flags, Mode::empty()).map_err(UdmabufError::Open)?;
        Ok(Self {
            device: device.into(),
            limits: Limits::read(),
        })
    }

    /// The limits, as they were when the device was opened.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Makes a dma-buf of `items`, in their order. Their pages stay in memory until its last descriptor is
    /// closed (`UDMABUF_CREATE_LIST`).
    pub fn create_list(&self, items: &[UdmabufItem]) -> Result<OwnedFd, UdmabufError> {
        let size = items
            .iter()
            .fold(0u64, |sum, item| sum.saturating_add(item.size));
        self.limits.check(items.len(), size)?;
        let words = words(items);
        // SAFETY: `words` is a `udmabuf_create_list` with as many items behind it as it says, which the
        // kernel only reads.
        let fd = unsafe { ioctl_with_ptr(&self.device, UDMABUF_CREATE_LIST(), words.as_ptr()) };
        if fd < 0 {
            return Err(UdmabufError::Refused {
                count: items.len(),
                size,
                source: Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL),
            });
        }
        // SAFETY: the kernel just made the descriptor for this call; nobody else has it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
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

    #[test]
    fn limits_name_the_parameter_to_raise() {
        let limits = Limits::DEFAULT;
        assert!(limits.check(1024, 64 << 20).is_ok());
        let many = limits.check(1025, 1 << 20).unwrap_err().to_string();
        assert!(
            many.contains("list_limit") && many.contains("1025"),
            "{many}"
        );
        let large = limits.check(1, (64 << 20) + 1).unwrap_err().to_string();
        assert!(
            large.starts_with("65 MiB") && large.contains("size_limit_mb"),
            "{large}"
        );
    }
}
