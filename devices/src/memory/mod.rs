//! Guest-physical memory: RAM, and the map of guest-physical addresses.

mod address_space;
mod arena;
mod limits;
mod ram;
mod slot;

pub use address_space::{
    AddressSpace, AddressSpaceError, Backing, BackingKind, IoHandler, MapWatcher, Region, Segment,
};
pub use arena::{Arena, ArenaError};
pub use limits::{Charge, Quota};
pub use ram::{GuestRam, HugePageSize, RamError};
pub use slot::SlotMapping;
