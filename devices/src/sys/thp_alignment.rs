//! A place for the next mapping at which huge pages can be mapped.
//!
//! A file's huge page is mapped as one only where its address is as aligned as its offset, in this process
//! and in the guest (Linux `include/linux/huge_mm.h`, thp_vma_suitable_order; KVM's
//! `kvm_mmu_max_mapping_level`). The kernel aligns mappings of memory files so only where an
//! administrator enabled huge pages for them.

use std::{ffi::c_void, ptr};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Size of a huge page.
const ALIGN: usize = 2 << 20;

/// A hole in the address space, with no access on both of its sides.
///
/// The kernel puts a mapping at the highest place that is large enough, which the hole then is: it was
/// cut out of the highest place for something larger. Should another thread's mapping take it, only the
/// alignment is lost.
#[derive(Debug)]
pub struct AlignedHole {
    below: (*mut c_void, usize),
    above: (*mut c_void, usize),
}

impl AlignedHole {
    /// A hole of `len` bytes, whole pages. `None` if the address space has no room.
    pub fn new(len: usize) -> Option<Self> {
        let reserved = len.checked_add(2 * ALIGN)?;
        // SAFETY: a new mapping at an address of the kernel's choice, which nothing can access.
        let start = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                reserved,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .ok()?;
        let before = start.addr().next_multiple_of(ALIGN) - start.addr();
        let hole = start.wrapping_byte_add(before);
        let end = hole.wrapping_byte_add(len);
        // SAFETY: within the reservation, of which nobody else knows.
        unsafe { munmap(hole, len) }.ok()?;
        Some(Self {
            below: (start, before),
            above: (end, reserved - before - len),
        })
    }
}

impl Drop for AlignedHole {
    fn drop(&mut self) {
        for (start, len) in [self.below, self.above] {
            if len > 0 {
                // SAFETY: what is left of the reservation, of which nobody else knows.
                let _ = unsafe { munmap(start, len) };
            }
        }
    }
}
