//! The kind of memory behind a descriptor from another process.

use std::{fs::File, io};

/// `f_type` of `fstatfs` for each kind.
const DMA_BUF_MAGIC: u64 = 0x444d_4142;
const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Kinds of files whose memory is shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A file of nothing but memory.
    Memory,
    /// A dma-buf.
    DmaBuf,
    /// Anything else.
    Other,
}

impl FileKind {
    /// The kind of `file`.
    pub fn of(file: &File) -> io::Result<Self> {
        Ok(match rustix::fs::fstatfs(file)?.f_type as u64 {
            DMA_BUF_MAGIC => Self::DmaBuf,
            TMPFS_MAGIC | HUGETLBFS_MAGIC => Self::Memory,
            _ => Self::Other,
        })
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn memory_is_told_from_other_files() {
        let memory = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
        assert_eq!(FileKind::of(&memory.into()).unwrap(), FileKind::Memory);
        let other = File::open("/proc/version").unwrap();
        assert_eq!(FileKind::of(&other).unwrap(), FileKind::Other);
    }
}
