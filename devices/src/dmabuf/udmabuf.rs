//! udmabuf: a dma-buf of pages of memfds (Linux `drivers/dma-buf/udmabuf.c`).

use std::{fs::File, os::fd::OwnedFd};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};
use thiserror::Error;

use crate::sys::udmabuf::{UdmabufItem, create_list};

const DEVICE: &str = "/dev/udmabuf";
const PARAMETERS: &str = "/sys/module/udmabuf/parameters";
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

/// What the kernel takes for one dma-buf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Pieces (`list_limit`).
    pub list_limit: u64,
    /// Mebibytes (`size_limit_mb`).
    pub size_limit_mb: u64,
}

impl Limits {
    /// Defaults of Linux.
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
        create_list(&self.device, items).map_err(|source| UdmabufError::Refused {
            count: items.len(),
            size,
            source: Errno::from_io_error(&source).unwrap_or(Errno::INVAL),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
