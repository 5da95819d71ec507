//! Host mappings as the guest sees them.

/// A host mapping to be shown to the guest as a memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotMapping {
    /// Guest-physical address, page aligned.
    pub gpa: u64,
    /// Length in bytes, page aligned.
    pub len: u64,
    /// Host-virtual address, valid while the slot exists.
    pub host: u64,
    /// Whether guest writes exit instead of reaching the memory.
    pub readonly: bool,
}
