//! The first half of the path: entries of the driver, looked up in the address space.

use thiserror::Error;

use super::export::Piece;
use crate::memory::{AddressSpace, AddressSpaceError, BackingKind, Segment};

/// A range of guest-physical memory as a driver names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryEntry {
    /// Guest-physical address of the first byte.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Why entries are not memory.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ScatterError {
    /// An entry lies where no memory is.
    #[error("entry {index}, {len:#x} bytes at {address:#x}", len = entry.len, address = entry.address)]
    NotMemory {
        /// Which entry.
        index: usize,
        /// What it says.
        entry: MemoryEntry,
        /// What the map says.
        #[source]
        source: AddressSpaceError,
    },
    /// An entry is memory, but none that can be used here.
    #[error(
        "entry {index}, {len:#x} bytes at {address:#x}, lies in {kind}, which cannot be used here",
        len = entry.len,
        address = entry.address
    )]
    WrongKind {
        /// Which entry.
        index: usize,
        /// What it says.
        entry: MemoryEntry,
        /// What lies there.
        kind: BackingKind,
    },
    /// An entry lies in another kind of memory than those before it.
    #[error(
        "entry {index}, {len:#x} bytes at {address:#x}, lies in {kind}, and what is before it in {first}: a \
         buffer is of one memory",
        len = entry.len,
        address = entry.address
    )]
    Mixed {
        /// Which entry.
        index: usize,
        /// What it says.
        entry: MemoryEntry,
        /// What lies there.
        kind: BackingKind,
        /// What lies where the first entry is.
        first: BackingKind,
    },
    /// The entries hold fewer bytes than are needed.
    #[error("{have:#x} bytes of memory for {need:#x}")]
    TooShort {
        /// Bytes in all entries.
        have: u64,
        /// Bytes needed.
        need: u64,
    },
}

/// The ranges of files behind a list of entries, in order. Adjacent ranges are merged.
#[derive(Clone, Debug, Default)]
pub struct ScatterList {
    segments: Vec<Segment>,
    len: u64,
}

impl ScatterList {
    /// Looks up `entries` until `size` bytes are found. All must be in RAM, or all in one BAR of a passed-through
    /// device. Bytes beyond `size` are ignored, and so are empty entries.
    pub fn resolve(
        map: &AddressSpace,
        entries: impl IntoIterator<Item = MemoryEntry>,
        size: u64,
    ) -> Result<Self, ScatterError> {
        let taken = |kind| matches!(kind, BackingKind::Ram | BackingKind::Bar { .. });
        Self::resolve_kinds(map, entries, size, taken)
    }

    /// The same for entries that are all in RAM.
    pub fn resolve_ram(
        map: &AddressSpace,
        entries: impl IntoIterator<Item = MemoryEntry>,
        size: u64,
    ) -> Result<Self, ScatterError> {
        Self::resolve_kinds(map, entries, size, |kind| kind == BackingKind::Ram)
    }

    fn resolve_kinds(
        map: &AddressSpace,
        entries: impl IntoIterator<Item = MemoryEntry>,
        size: u64,
        taken: impl Fn(BackingKind) -> bool,
    ) -> Result<Self, ScatterError> {
        let mut list = Self::default();
        let view = map.view();
        let mut walk = view.walk();
        let entries = entries.into_iter();
        list.segments.reserve(entries.size_hint().0);
        for (index, entry) in entries.enumerate() {
            let not_memory = |source| ScatterError::NotMemory {
                index,
                entry,
                source,
            };
            let mut left = entry.len.min(size - list.len);
            let mut at = entry.address;
            while left > 0 {
                let found = walk.find(at, left).map_err(not_memory)?;
                let kind = found.region.kind;
                let first = list.segments.first();
                let first = first.map_or(kind, |first| first.backing.kind);
                if !taken(kind) {
                    return Err(ScatterError::WrongKind { index, entry, kind });
                }
                if kind != first {
                    return Err(ScatterError::Mixed {
                        index,
                        entry,
                        kind,
                        first,
                    });
                }
                found.add_to(&mut list.segments);
                list.len += found.len;
                left -= found.len;
                at += found.len;
            }
        }
        if list.len < size {
            return Err(ScatterError::TooShort {
                have: list.len,
                need: size,
            });
        }
        list.segments.shrink_to_fit();
        Ok(list)
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is not a single byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The ranges, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The ranges as pieces of files.
    pub fn into_pieces(self) -> Vec<Piece> {
        let segments = self.segments.into_iter();
        segments
            .map(|segment| Piece {
                kind: segment.backing.kind,
                file: segment.backing.file,
                offset: segment.backing.offset,
                len: segment.len,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::memory::Backing;

    fn map() -> AddressSpace {
        let map = AddressSpace::new();
        let file = Arc::new(tempfile::tempfile().unwrap());
        let backing = |kind, offset| Backing {
            kind,
            file: file.clone(),
            offset,
        };
        let bar = BackingKind::Bar {
            device: 3,
            region: 2,
            start: 0,
        };
        for (gpa, kind, offset) in [
            (0, BackingKind::Ram, 0),
            (0x2_0000, BackingKind::Ram, 0x1_0000),
            (0x8_0000, bar, 0),
        ] {
            map.insert_backed(gpa, 0x1_0000, backing(kind, offset))
                .unwrap();
        }
        map
    }

    fn entries(list: &[(u64, u64)]) -> Vec<MemoryEntry> {
        let list = list.iter();
        list.map(|&(address, len)| MemoryEntry { address, len })
            .collect()
    }

    fn resolve(list: &[(u64, u64)], size: u64) -> Result<Vec<(u64, u64)>, ScatterError> {
        let list = ScatterList::resolve(&map(), entries(list), size)?;
        assert_eq!(list.len(), size);
        let pieces = list.into_pieces();
        Ok(pieces.iter().map(|p| (p.offset, p.len)).collect())
    }

    #[test]
    fn adjacent_entries_are_one_piece() {
        let got = resolve(
            &[(0x1000, 0x1000), (0x2000, 0x3000), (0x9000, 0x1000)],
            0x5000,
        );
        assert_eq!(got.unwrap(), [(0x1000, 0x4000), (0x9000, 0x1000)]);
    }

    #[test]
    fn order_is_kept_and_what_is_not_needed_is_left_out() {
        let got = resolve(
            &[(0x2000, 0x1000), (0, 0), (0x1000, 0x1000), (0x7000, 1)],
            0x1800,
        );
        assert_eq!(got.unwrap(), [(0x2000, 0x1000), (0x1000, 0x800)]);
    }

    #[test]
    fn a_bar_is_memory_where_it_may_be() {
        let list = [(0x8_2000, 0x1000), (0x8_0000, 0x1000)];
        assert_eq!(
            resolve(&list, 0x2000).unwrap(),
            [(0x2000, 0x1000), (0, 0x1000)]
        );
        let error = ScatterList::resolve_ram(&map(), entries(&list), 0x2000).unwrap_err();
        assert!(
            matches!(error, ScatterError::WrongKind { index: 0, .. }),
            "{error}"
        );
    }

    #[test]
    fn the_entry_at_fault_is_named() {
        let error = resolve(&[(0, 0x1000), (0xf000, 0x2000)], 0x3000).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("entry 1, 0x2000 bytes at 0xf000")
        );
        let error = resolve(&[(0, 0x1000), (0x8_0000, 0x1000)], 0x2000).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("lies in BAR 2 of passed-through device 3, and what is before it in"),
            "{text}"
        );
        assert!(text.contains("the guest's RAM"), "{text}");
        let error = resolve(&[(0, 0x1000)], 0x1001).unwrap_err();
        assert_eq!(
            error,
            ScatterError::TooShort {
                have: 0x1000,
                need: 0x1001
            }
        );
        assert!(resolve(&[(u64::MAX, u64::MAX)], 8).is_err());
    }
}
