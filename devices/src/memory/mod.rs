//! Guest-physical memory: RAM, and the map of what lies where.

mod address_space;
mod arena;
mod limits;
mod ram;
mod slot;

pub use crate::sys::file_kind::FileKind;
pub use address_space::{
    AddressSpace, AddressSpaceError, Backing, BackingKind, IoHandler, MapWatcher, Region, Segment,
};
pub use arena::{Arena, ArenaError};
pub use ram::{GuestRam, HugePageSize, RamError};
pub use slot::SlotMapping;
