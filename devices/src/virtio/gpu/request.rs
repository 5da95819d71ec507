//! Requests of the driver: read once from guest memory, checked.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{
    error::CommandError,
    format::Format,
    geometry::Area,
    output::OUTPUTS,
    protocol::{MemEntry, Rect},
};
use crate::{GuestMemory, dmabuf::MemoryEntry, virtio::Buffers};

/// The longest list of entries: 1 GiB of single pages, which is more than any image.
const MAX_ENTRIES: u32 = 1 << 18;

/// What the driver wrote, read from front to back.
#[derive(Debug)]
pub struct Input<'a> {
    /// Guest memory.
    pub mem: &'a GuestMemory,
    /// What is left of the request.
    pub buffers: Buffers,
}

impl Input<'_> {
    /// The next structure.
    pub fn take<T: FromBytes + IntoBytes + Immutable>(&mut self) -> Result<T, CommandError> {
        let mut value = T::new_zeroed();
        self.read(value.as_mut_bytes())?;
        Ok(value)
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), CommandError> {
        let part = self.buffers.take_front(bytes.len() as u64);
        if part.len() < bytes.len() as u64 {
            return Err(CommandError::Truncated);
        }
        part.read(self.mem, bytes)
            .map_err(|_| CommandError::Truncated)
    }

    /// The list of `count` entries that follows.
    pub fn entries(&mut self, count: u32) -> Result<Vec<MemoryEntry>, CommandError> {
        if count > MAX_ENTRIES {
            return Err(CommandError::Parameter("number of entries"));
        }
        let mut entries = vec![MemEntry::default(); count as usize];
        self.read(entries.as_mut_bytes())?;
        let entries = entries.iter().map(|entry| MemoryEntry {
            address: entry.addr.get(),
            len: entry.length.get().into(),
        });
        Ok(entries.collect())
    }
}

pub fn scanout_index(id: u32) -> Result<usize, CommandError> {
    let index = id as usize;
    if index < OUTPUTS {
        Ok(index)
    } else {
        Err(CommandError::Scanout(id))
    }
}

pub fn area(rect: &Rect) -> Result<Area, CommandError> {
    Area::from_wire(rect).ok_or(CommandError::Parameter("rectangle"))
}

pub fn format(id: u32) -> Result<Format, CommandError> {
    Format::from_id(id).ok_or(CommandError::Parameter("format"))
}
