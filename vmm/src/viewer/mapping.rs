//! Shared memory of frames. Others write it while it is read, so bytes are copied and never borrowed.

use std::{io, os::fd::AsFd, ptr};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A mapping of a descriptor from its start on.
#[derive(Debug)]
pub struct Mapping {
    start: *mut u8,
    len: usize,
}

// SAFETY: the mapping belongs to the value, and every access is a copy through a raw pointer.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `len` bytes to read, and to write if `writable`.
    pub fn new(fd: impl AsFd, len: usize, writable: bool) -> io::Result<Self> {
        let access = if writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap(ptr::null_mut(), len, access, MapFlags::SHARED, fd, 0) }?;
        Ok(Self {
            start: start.cast(),
            len,
        })
    }

    /// Copies `len` bytes at `from` in `source` to `to`. `None`, and nothing is copied, if a range is not
    /// within its mapping.
    pub fn copy(&self, to: usize, source: &Self, from: usize, len: usize) -> Option<()> {
        let within = |at: usize, of: &Self| at.checked_add(len).is_some_and(|end| end <= of.len);
        if !within(to, self) || !within(from, source) {
            return None;
        }
        // SAFETY: both ranges are within live mappings, checked above, which are different ones.
        unsafe {
            ptr::copy_nonoverlapping(source.start.add(from), self.start.add(to), len);
        }
        Some(())
    }

    /// Copies bytes to `to`. `None`, and nothing is copied, if they do not fit.
    pub fn write(&self, to: usize, bytes: &[u8]) -> Option<()> {
        if to.checked_add(bytes.len())? > self.len {
            return None;
        }
        // SAFETY: the range is within a live mapping, checked above.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(to), bytes.len()) };
        Some(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and nothing points into it.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn copies_stay_within() {
        let (a, b) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        a.set_len(4096).unwrap();
        b.write_all_at(&[7; 4096], 0).unwrap();
        let to = Mapping::new(&a, 4096, true).unwrap();
        let from = Mapping::new(&b, 4096, false).unwrap();
        assert!(to.copy(4090, &from, 0, 6).is_some());
        assert!(to.copy(4091, &from, 0, 6).is_none());
        assert!(to.copy(0, &from, usize::MAX, 6).is_none());
        assert!(to.write(4095, &[9, 9]).is_none());
        assert!(to.write(4095, &[9]).is_some());
        let mut bytes = [0; 6];
        a.read_exact_at(&mut bytes, 4090).unwrap();
        assert_eq!(bytes, [7, 7, 7, 7, 7, 9]);
    }
}
