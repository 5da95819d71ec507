//! Guest memory as plain bytes before any vCPU runs, for decompressors and relocation.

use rustix::mm::{Advice, madvise};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::GuestMemory;

/// Runs `use_bytes` on `len` bytes of guest memory from `start` on, all in one region.
///
/// Nothing else may use guest memory meanwhile: the loader runs before vCPUs and devices do.
pub fn with_bytes<T>(
    mem: &GuestMemory,
    start: u64,
    len: usize,
    use_bytes: impl FnOnce(&mut [u8]) -> T,
) -> Result<T, GuestMemoryError> {
    let slice = mem.get_slice(GuestAddress(start), len)?;
    let guard = slice.ptr_guard_mut();
    // SAFETY: `get_slice` checked that the bytes lie in one mapping of this process, which `mem` keeps
    // alive; no vCPU or device thread exists yet, so this is the only reference to them.
    let bytes = unsafe { std::slice::from_raw_parts_mut(guard.as_ptr(), len) };
    Ok(use_bytes(bytes))
}

/// Has the host allocate the pages of a range at once: a fault for each costs a multiple. Runs beside
/// whoever fills the range.
pub fn populate(mem: &GuestMemory, start: u64, len: usize) {
    let Ok(slice) = mem.get_slice(GuestAddress(start), len) else {
        return;
    };
    let guard = slice.ptr_guard_mut();
    let pages = guard.as_ptr().map_addr(|address| address & !(PAGE - 1));
    let len = len + (guard.as_ptr().addr() - pages.addr());
    // SAFETY: the pages are a live mapping, which `mem` keeps alive; the advice changes no content.
    let result = unsafe { madvise(pages.cast(), len, Advice::LinuxPopulateWrite) };
    if let Err(error) = result {
        // Before Linux 5.14, for example: every page is a fault then, and nothing else is lost.
        tracing::debug!(%error, "cannot populate guest memory ahead");
    }
}

const PAGE: usize = crate::layout::PAGE_SIZE as usize;
