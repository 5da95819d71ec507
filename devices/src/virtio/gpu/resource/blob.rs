//! Memory behind a blob: RAM, or memory of a passed-through device. The latter goes while the guest has it off,
//! resets the device or has it in a low-power state, and comes back.

use std::{
    fs::File,
    sync::{Arc, Weak},
};

use super::surface::Surface;
use crate::{
    dmabuf::{Piece, ScatterList},
    memory::{AddressSpace, BackingKind, Charge, Segment},
};

/// A resource of guest memory.
#[derive(Debug)]
pub struct Blob {
    /// Bytes.
    pub size: u64,
    /// The memory.
    pub memory: BlobMemory,
    pub(super) _charge: Charge,
}

/// Memory behind a blob.
#[derive(Debug)]
pub enum BlobMemory {
    /// None: between DETACH_BACKING and ATTACH_BACKING.
    Detached,
    /// RAM.
    Ram(Arc<Surface>),
    /// Memory of a passed-through device.
    Device {
        /// The ranges that the driver named, as they were then.
        ranges: Vec<BlobRange>,
        /// The memory while all of it is there.
        surface: Option<Arc<Surface>>,
        /// The guest is charged for what it named.
        charge: Arc<Charge>,
    },
}

/// A range of guest-physical memory and its backing. It does not keep the device open, which may be unplugged.
#[derive(Debug)]
pub struct BlobRange {
    gpa: u64,
    len: u64,
    kind: BackingKind,
    file: Weak<File>,
    offset: u64,
}

impl From<&Segment> for BlobRange {
    fn from(segment: &Segment) -> Self {
        Self {
            gpa: segment.gpa,
            len: segment.len,
            kind: segment.backing.kind,
            file: Arc::downgrade(&segment.backing.file),
            offset: segment.backing.offset,
        }
    }
}

impl BlobRange {
    fn overlaps(&self, gpa: u64, len: u64) -> bool {
        // Both are or were in the address space, so neither is empty or passes its end.
        self.gpa <= gpa + (len - 1) && gpa <= self.gpa + (self.len - 1)
    }

    /// The piece of a file, if the same backing still lies there.
    fn find(&self, map: &AddressSpace) -> Option<Piece> {
        let segments = map.resolve(self.gpa, self.len).ok()?;
        let [segment] = &*segments else { return None };
        let backing = &segment.backing;
        let same = backing.kind == self.kind
            && backing.offset == self.offset
            && Weak::ptr_eq(&Arc::downgrade(&backing.file), &self.file);
        same.then(|| Piece {
            kind: self.kind,
            file: backing.file.clone(),
            offset: self.offset,
            len: self.len,
        })
    }
}

impl BlobMemory {
    /// Memory of ranges that were looked up.
    pub fn new(memory: ScatterList, charge: Arc<Charge>) -> Self {
        let segments = memory.segments();
        let in_device = segments
            .iter()
            .any(|segment| segment.backing.kind != BackingKind::Ram);
        let ranges = in_device.then(|| segments.iter().map(BlobRange::from).collect());
        let surface = Surface::new(memory.into_pieces(), charge.clone());
        match ranges {
            None => Self::Ram(surface),
            Some(ranges) => Self::Device {
                ranges,
                surface: Some(surface),
                charge,
            },
        }
    }

    /// The memory now.
    pub fn surface(&self) -> Option<&Arc<Surface>> {
        match self {
            Self::Detached => None,
            Self::Ram(surface) => Some(surface),
            Self::Device { surface, .. } => surface.as_ref(),
        }
    }

    /// Whether the driver has detached it.
    pub fn is_detached(&self) -> bool {
        matches!(self, Self::Detached)
    }

    /// Whether it is attached, and off.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Device { surface: None, .. })
    }

    /// Memory was mapped at `[gpa, gpa + len)` or removed. Returns whether that changes the blob.
    ///
    /// Memory that comes back is a new buffer, and gets a new dma-buf. An importer of the old one may have it
    /// mapped where nothing will ever be again (iommufd does).
    pub fn changed(&mut self, map: &AddressSpace, gpa: u64, len: u64) -> bool {
        let Self::Device {
            ranges,
            surface,
            charge,
        } = self
        else {
            return false;
        };
        if !ranges.iter().any(|range| range.overlaps(gpa, len)) {
            return false;
        }
        let had = surface.is_some();
        let pieces: Option<Vec<_>> = ranges.iter().map(|range| range.find(map)).collect();
        match pieces {
            None => *surface = None,
            Some(_) if had => {}
            Some(pieces) => *surface = Some(Surface::new(pieces, charge.clone())),
        }
        had != surface.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dmabuf::MemoryEntry,
        memory::{Backing, Quota},
    };

    const BAR: u64 = 0x10_0000;
    const LEN: u64 = 0x1_0000;

    fn backing(file: &Arc<File>, region: u32) -> Backing {
        Backing {
            kind: BackingKind::Bar {
                device: 0,
                region,
                start: 0,
            },
            file: file.clone(),
            offset: 0,
        }
    }

    fn charge() -> Arc<Charge> {
        Arc::new(Quota::new(1 << 20).charge(1).unwrap())
    }

    fn memory(map: &AddressSpace, list: &[(u64, u64)]) -> BlobMemory {
        let entries = list
            .iter()
            .map(|&(address, len)| MemoryEntry { address, len });
        let size = list.iter().map(|(_, len)| len).sum();
        BlobMemory::new(ScatterList::resolve(map, entries, size).unwrap(), charge())
    }

    #[test]
    fn memory_goes_with_its_bar_and_comes_back_as_another_buffer() {
        let map = AddressSpace::new();
        let file = Arc::new(tempfile::tempfile().unwrap());
        map.insert_backed(BAR, LEN, backing(&file, 2)).unwrap();
        let mut blob = memory(&map, &[(BAR + 0x2000, 0x1000), (BAR, 0x1000)]);
        let first = blob.surface().unwrap().clone();
        assert!(!blob.changed(&map, BAR, LEN), "it is there as before");
        map.remove(BAR, LEN).unwrap();
        assert!(blob.changed(&map, BAR, LEN));
        assert!(blob.is_gone() && blob.surface().is_none());
        assert!(!blob.changed(&map, BAR, LEN), "gone already");
        map.insert_backed(BAR, LEN, backing(&file, 2)).unwrap();
        assert!(!blob.changed(&map, BAR + LEN, LEN), "not here");
        assert!(blob.changed(&map, BAR, LEN));
        let second = blob.surface().unwrap();
        assert!(!Arc::ptr_eq(&first, second));
        assert_eq!(second.buffer.pieces().len(), 2);
    }

    #[test]
    fn something_else_at_its_place_is_not_it() {
        let map = AddressSpace::new();
        let file = Arc::new(tempfile::tempfile().unwrap());
        map.insert_backed(BAR, LEN, backing(&file, 2)).unwrap();
        let mut blob = memory(&map, &[(BAR, LEN)]);
        map.remove(BAR, LEN).unwrap();
        assert!(blob.changed(&map, BAR, LEN));
        let other = Arc::new(tempfile::tempfile().unwrap());
        for wrong in [backing(&file, 0), backing(&other, 2)] {
            map.insert_backed(BAR, LEN, wrong).unwrap();
            assert!(!blob.changed(&map, BAR, LEN));
            map.remove(BAR, LEN).unwrap();
        }
        drop(blob);
        assert_eq!(Arc::strong_count(&file), 1);
    }

    #[test]
    fn a_device_that_is_taken_out_is_not_kept_open() {
        let map = AddressSpace::new();
        let file = Arc::new(tempfile::tempfile().unwrap());
        map.insert_backed(BAR, LEN, backing(&file, 2)).unwrap();
        let mut blob = memory(&map, &[(BAR, LEN)]);
        map.remove(BAR, LEN).unwrap();
        blob.changed(&map, BAR, LEN);
        assert_eq!(Arc::strong_count(&file), 1);
    }

    #[test]
    fn ranges_overlap_at_their_edges() {
        let range = BlobRange {
            gpa: 0,
            len: 0x1000,
            kind: BackingKind::Ram,
            file: Weak::new(),
            offset: 0,
        };
        assert!(range.overlaps(0, 1) && range.overlaps(0xfff, 1));
        assert!(!range.overlaps(0x1000, 0x1000));
        let last = BlobRange {
            gpa: u64::MAX - 0xfff,
            len: 0x1000,
            ..range
        };
        assert!(last.overlaps(u64::MAX, 1) && !last.overlaps(0, 0x1000));
    }
}
