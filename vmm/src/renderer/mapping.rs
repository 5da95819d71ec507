//! Guest RAM and the files of pixels, mapped.

use std::{ffi::c_void, fs::File, io, os::fd::AsFd};

use fanlight_devices::virtio::gpu::render::wire::RamRange;
use libc::iovec;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::library::Refused;

/// Shared memory of a file, to read and write.
#[derive(Debug)]
pub struct Mapping {
    start: *mut c_void,
    len: usize,
}

impl Mapping {
    /// Maps the whole file.
    pub fn new(file: &File) -> io::Result<Self> {
        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address that the kernel chooses. No reference points into it.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file.as_fd(),
                0,
            )
        }?;
        Ok(Self { start, len })
    }

    /// A range of it. Fails if it is not within the mapping.
    pub fn part(&self, range: &RamRange) -> Result<iovec, Refused> {
        let len = self.len as u64;
        let end = range.offset.checked_add(range.len);
        if end.is_none_or(|end| end > len) {
            return Err(Refused);
        }
        Ok(iovec {
            iov_base: self.start.wrapping_byte_add(range.offset as usize),
            iov_len: range.len as usize,
        })
    }

    /// Copies a range to the front of `to`. Returns its length.
    pub fn copy(&self, range: &RamRange, to: &mut [u8]) -> Result<usize, Refused> {
        let part = self.part(range)?;
        if part.iov_len > to.len() {
            return Err(Refused);
        }
        let from = part.iov_base.cast();
        // SAFETY: the range is within the mapping and `to` is long enough. The guest may write meanwhile; every byte
        // is valid.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), part.iov_len) };
        Ok(part.iov_len)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to `self`, and the library has no pointer into it any more.
        let _ = unsafe { munmap(self.start, self.len) };
    }
}
