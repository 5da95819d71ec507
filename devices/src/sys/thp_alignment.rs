//! Alignment of the next mapping, so that transparent huge pages can back it.
//!
//! A huge page of a file is mapped as one only where its address is as aligned as its offset, in this process and in
//! the guest (Linux `include/linux/huge_mm.h`, thp_vma_suitable_order; KVM's `kvm_mmu_max_mapping_level`). The kernel
//! aligns mappings of memory files itself only where an administrator enabled huge pages for them.

use super::reservation::Reservation;

/// Size of a huge page.
const ALIGN: usize = 2 << 20;

/// An aligned hole in the address space, with reserved addresses on both sides.
///
/// The kernel puts a mapping at the highest free range that is large enough. That is the hole, which was cut out of
/// the highest range for something larger. If a mapping of another thread takes it, only the alignment is lost.
#[derive(Debug)]
pub struct AlignedHole {
    #[expect(dead_code, reason = "held for its Drop")]
    sides: [Reservation; 2],
}

impl AlignedHole {
    /// A hole of `len` bytes, whole pages. `None` if there is no free range of that size.
    pub fn new(len: usize) -> Option<Self> {
        let whole = Reservation::new(len.checked_add(2 * ALIGN)?).ok()?;
        let start = whole.address(0).addr();
        let (below, rest) = whole.split_at(start.next_multiple_of(ALIGN) - start);
        let (hole, above) = rest.split_at(len);
        drop(hole);
        Some(Self {
            sides: [below, above],
        })
    }
}
