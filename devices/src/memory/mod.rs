//! Guest-physical memory: RAM, and the map of what lies where.

mod address_space;
mod aligned_hole;
mod arena;
mod budget;
mod file_kind;
mod quiet_place;
mod ram;

pub use address_space::{
    AddressSpace, AddressSpaceError, Backing, BackingKind, IoHandler, MapWatcher, Region, Segment,
};
pub use arena::{Arena, ArenaError};
pub use file_kind::FileKind;
pub use ram::{GuestRam, HugePageSize, RamError};

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
