//! Guest memory as plain bytes before any vCPU runs, for decompressors and relocation.

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
