//! The one map of guest-physical addresses.
//!
//! Every range is either answered by a device ([`IoHandler`]) or backed by a range of a file ([`Backing`]): RAM, a
//! passed-through BAR or shared memory of a device. Exports and DMA mappings ask [`AddressSpace::resolve`] for the
//! file and offset; nothing is found out by trying. The map makes no memory slots: the owner of the mapping does.
//!
//! I/O ports are a second, small instance of the same type.

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    sync::{Arc, RwLockReadGuard, Weak},
};

use thiserror::Error;

use crate::sync::RwLock;

/// What answers the guest's accesses to a range that is not memory.
///
/// Called from vCPU threads, with no lock of the address space held. Offsets are relative to the
/// start of the region; an access never crosses its end.
pub trait IoHandler: Send + Sync {
    /// Fills `data`, which is zeroed and 1 to 8 bytes long.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data`, 1 to 8 bytes.
    fn write(&self, offset: u64, data: &[u8]);
}

/// What kind of memory a range is, which decides how it can be exported and mapped for DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BackingKind {
    /// Guest RAM: pages of the machine's memfd.
    Ram,
    /// A region of a VFIO device: `file` is the device.
    Bar {
        /// The machine's number for the device.
        device: u32,
        /// VFIO region index, 0 to 5.
        region: u32,
        /// Where the region starts in the file.
        start: u64,
    },
    /// Memory that a virtio device shares with its driver (Virtio 1.3, 2.10).
    SharedMemory {
        /// The machine's number for the device.
        device: u32,
        /// Shared memory id.
        id: u8,
    },
    /// Memory of the renderer: `file` is a dma-buf. No guest-physical range is of this kind.
    Renderer,
}

impl fmt::Display for BackingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BackingKind::Ram => f.write_str("the guest's RAM"),
            BackingKind::Bar { device, region, .. } => {
                write!(f, "BAR {region} of passed-through device {device}")
            }
            BackingKind::SharedMemory { device, id } => {
                write!(f, "shared memory {id} of virtio device {device}")
            }
            BackingKind::Renderer => f.write_str("memory of the renderer"),
        }
    }
}

/// The file and offset behind a range.
#[derive(Clone, Debug)]
pub struct Backing {
    /// Kind of memory.
    pub kind: BackingKind,
    /// What is mapped.
    pub file: Arc<File>,
    /// Where in `file` the range starts, in bytes.
    pub offset: u64,
}

/// The content of a range.
#[derive(Clone)]
pub enum Region {
    /// A device answers each access.
    Io(Arc<dyn IoHandler>),
    /// A file. The guest reaches it through a memory slot.
    Backed(Backing),
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Region::Io(_) => f.write_str("Io"),
            Region::Backed(backing) => backing.fmt(f),
        }
    }
}

/// A piece of a resolved range: `len` bytes at `gpa` are `backing.file` from `backing.offset` on.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Length in bytes, never zero.
    pub len: u64,
    /// What backs it; the offset is that of the first byte.
    pub backing: Backing,
}

/// Why a range could not be added, removed or resolved.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AddressSpaceError {
    /// The range is empty or passes the end of the 64-bit space.
    #[error("{len:#x} bytes at {gpa:#x} are not a range of addresses")]
    BadRange {
        /// Start.
        gpa: u64,
        /// Length.
        len: u64,
    },
    /// Another region lies there.
    #[error("{len:#x} bytes at {gpa:#x} overlap the {other_len:#x} bytes at {other_gpa:#x}")]
    Overlap {
        /// Start of the refused range.
        gpa: u64,
        /// Its length.
        len: u64,
        /// Start of the other region.
        other_gpa: u64,
        /// Its length.
        other_len: u64,
    },
    /// No region of exactly this start and length.
    #[error("no region of {len:#x} bytes starts at {gpa:#x}")]
    NotFound {
        /// Start.
        gpa: u64,
        /// Length.
        len: u64,
    },
    /// Nothing lies at an address.
    #[error("nothing lies at guest-physical address {gpa:#x}")]
    Unmapped {
        /// The first such address.
        gpa: u64,
    },
    /// A device register lies at an address, not memory.
    #[error("guest-physical address {gpa:#x} is a device's register, not memory")]
    NotMemory {
        /// The first such address.
        gpa: u64,
    },
}

#[derive(Clone, Debug)]
struct Entry {
    len: u64,
    region: Region,
}

/// Follows the map. Memory of a passed-through device comes and goes as the guest switches it, so a kept result of
/// a lookup can become wrong.
pub trait MapWatcher: fmt::Debug + Send + Sync {
    /// Memory was mapped at `[gpa, gpa + len)`, or is no longer. Called on the thread that changed the map, with no
    /// lock of it held.
    fn memory_changed(&self, map: &AddressSpace, gpa: u64, len: u64);
}

/// The map, locked for reading; see [`AddressSpace::view`].
#[derive(Debug)]
pub struct MapView<'a>(RwLockReadGuard<'a, BTreeMap<u64, Entry>>);

impl MapView<'_> {
    fn entry(&self, gpa: u64) -> Option<(u64, &Entry)> {
        let (&start, entry) = self.0.range(..=gpa).next_back()?;
        (gpa - start < entry.len).then_some((start, entry))
    }

    /// A walk for many ranges, most of which are adjacent.
    pub fn walk(&self) -> Walk<'_> {
        Walk {
            map: self,
            last: None,
        }
    }
}

/// Looks ranges up one after the other; see [`MapView::walk`].
#[derive(Debug)]
pub struct Walk<'a> {
    map: &'a MapView<'a>,
    /// The region of the last address, which usually holds the next one too.
    last: Option<(u64, &'a Entry)>,
}

/// What a [`Walk`] finds: a piece that ends where its region or the range does.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Length in bytes, never zero.
    pub len: u64,
    /// Where in the file the first byte is.
    pub offset: u64,
    /// What backs all of the region.
    pub region: &'a Backing,
}

impl Found<'_> {
    /// Adds it to `segments`, or extends the last segment if it continues that in file and address.
    pub fn add_to(&self, segments: &mut Vec<Segment>) {
        match segments.last_mut() {
            Some(last)
                if last.backing.offset + last.len == self.offset
                    && last.gpa + last.len == self.gpa
                    && last.backing.kind == self.region.kind
                    && Arc::ptr_eq(&last.backing.file, &self.region.file) =>
            {
                last.len += self.len;
            }
            _ => segments.push(Segment {
                gpa: self.gpa,
                len: self.len,
                backing: Backing {
                    offset: self.offset,
                    ..self.region.clone()
                },
            }),
        }
    }
}

impl<'a> Walk<'a> {
    /// Looks up at most `len` bytes at an address. Fails where there is no memory.
    pub fn find(&mut self, gpa: u64, len: u64) -> Result<Found<'a>, AddressSpaceError> {
        let end = range_end(gpa, len)?;
        let (start, entry) = match self.last {
            Some((start, entry)) if gpa >= start && gpa - start < entry.len => (start, entry),
            _ => {
                let found = self.map.entry(gpa);
                self.last = found;
                found.ok_or(AddressSpaceError::Unmapped { gpa })?
            }
        };
        let Region::Backed(region) = &entry.region else {
            return Err(AddressSpaceError::NotMemory { gpa });
        };
        Ok(Found {
            gpa,
            len: (start + (entry.len - 1) - gpa + 1).min(end - gpa),
            offset: region.offset + (gpa - start),
            region,
        })
    }
}

/// The map of guest-physical addresses.
#[derive(Debug, Default)]
pub struct AddressSpace {
    /// Keyed by start; entries never overlap.
    entries: RwLock<BTreeMap<u64, Entry>>,
    watchers: RwLock<Vec<Weak<dyn MapWatcher>>>,
}

impl AddressSpace {
    /// An empty map.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `handler` answer accesses to `[gpa, gpa + len)`.
    pub fn insert_io(
        &self,
        gpa: u64,
        len: u64,
        handler: Arc<dyn IoHandler>,
    ) -> Result<(), AddressSpaceError> {
        self.insert(gpa, len, Region::Io(handler))
    }

    /// Records that `backing` lies at `[gpa, gpa + len)`.
    pub fn insert_backed(
        &self,
        gpa: u64,
        len: u64,
        backing: Backing,
    ) -> Result<(), AddressSpaceError> {
        self.insert(gpa, len, Region::Backed(backing))?;
        self.tell(gpa, len);
        Ok(())
    }

    /// Lets `watcher` follow changes of memory from now on, until it is dropped.
    pub fn watch(&self, watcher: Weak<dyn MapWatcher>) {
        let mut watchers = self.watchers.write();
        watchers.retain(|watcher| watcher.strong_count() > 0);
        watchers.push(watcher);
    }

    fn tell(&self, gpa: u64, len: u64) {
        let all = self.watchers.read();
        let watchers: Vec<_> = all.iter().filter_map(Weak::upgrade).collect();
        drop(all);
        for watcher in watchers {
            watcher.memory_changed(self, gpa, len);
        }
    }

    fn insert(&self, gpa: u64, len: u64, region: Region) -> Result<(), AddressSpaceError> {
        let end = range_end(gpa, len)?;
        let mut entries = self.entries.write();
        if let Some((&other_gpa, other)) = entries.range(..=end - 1).next_back()
            && other_gpa + (other.len - 1) >= gpa
        {
            return Err(AddressSpaceError::Overlap {
                gpa,
                len,
                other_gpa,
                other_len: other.len,
            });
        }
        entries.insert(gpa, Entry { len, region });
        Ok(())
    }

    /// Removes the region that was inserted with exactly this start and length.
    pub fn remove(&self, gpa: u64, len: u64) -> Result<(), AddressSpaceError> {
        let mut entries = self.entries.write();
        let removed = match entries.get(&gpa) {
            Some(entry) if entry.len == len => entries.remove(&gpa),
            _ => return Err(AddressSpaceError::NotFound { gpa, len }),
        };
        drop(entries);
        if removed.is_some_and(|entry| matches!(entry.region, Region::Backed(_))) {
            self.tell(gpa, len);
        }
        Ok(())
    }

    /// The region that holds `gpa`: its start, length and content.
    pub fn lookup(&self, gpa: u64) -> Option<(u64, u64, Region)> {
        let view = self.view();
        let (start, entry) = view.entry(gpa)?;
        Some((start, entry.len, entry.region.clone()))
    }

    /// A locked view of the map for many lookups. The map does not change while the view exists.
    pub fn view(&self) -> MapView<'_> {
        MapView(self.entries.read())
    }

    /// Which files and offsets back `[gpa, gpa + len)`, in order. Adjacent ranges of one file are one segment.
    /// Fails at the first address that is not memory.
    pub fn resolve(&self, gpa: u64, len: u64) -> Result<Vec<Segment>, AddressSpaceError> {
        let (view, mut segments) = (self.view(), Vec::new());
        let mut walk = view.walk();
        let end = range_end(gpa, len)?;
        let mut at = gpa;
        while at < end {
            let found = walk.find(at, end - at)?;
            found.add_to(&mut segments);
            at += found.len;
        }
        Ok(segments)
    }

    /// A read by the guest. Bytes that no device answers read as ones, as on a real bus.
    pub fn read(&self, gpa: u64, data: &mut [u8]) {
        match self.handler(gpa, data.len()) {
            Some((handler, offset)) => {
                data.fill(0);
                handler.read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// A write by the guest. Bytes that no device takes are lost, as on a real bus.
    pub fn write(&self, gpa: u64, data: &[u8]) {
        if let Some((handler, offset)) = self.handler(gpa, data.len()) {
            handler.write(offset, data);
        }
    }

    /// The device that answers `len` bytes at `gpa`, all within one region, and the offset there.
    fn handler(&self, gpa: u64, len: usize) -> Option<(Arc<dyn IoHandler>, u64)> {
        let (start, region_len, region) = self.lookup(gpa)?;
        let offset = gpa - start;
        match region {
            Region::Io(handler) if region_len - offset >= len as u64 => Some((handler, offset)),
            _ => None,
        }
    }
}

/// One past the last address of a range that must not be empty or reach the very end of the space.
fn range_end(gpa: u64, len: u64) -> Result<u64, AddressSpaceError> {
    gpa.checked_add(len)
        .filter(|_| len != 0)
        .ok_or(AddressSpaceError::BadRange { gpa, len })
}

#[cfg(test)]
mod tests {
    use crate::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl IoHandler for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().push((offset, data.to_vec()));
        }
    }

    fn ram(file: &Arc<File>, offset: u64) -> Backing {
        Backing {
            kind: BackingKind::Ram,
            file: file.clone(),
            offset,
        }
    }

    fn file() -> Arc<File> {
        Arc::new(tempfile::tempfile().unwrap())
    }

    #[test]
    fn resolve_names_file_and_offset_and_merges_what_continues() {
        let (map, file) = (AddressSpace::new(), file());
        map.insert_backed(0, 0x1000, ram(&file, 0)).unwrap();
        map.insert_backed(0x1000, 0x1000, ram(&file, 0x1000))
            .unwrap();
        map.insert_backed(0x2000, 0x1000, ram(&file, 0x8000))
            .unwrap();
        let got: Vec<_> = map
            .resolve(0x800, 0x2000)
            .unwrap()
            .iter()
            .map(|s| (s.gpa, s.len, s.backing.offset))
            .collect();
        assert_eq!(got, [(0x800, 0x1800, 0x800), (0x2000, 0x800, 0x8000)]);
    }

    #[test]
    fn ram_and_a_bar_are_told_apart() {
        let (map, file) = (AddressSpace::new(), file());
        let bar = Backing {
            kind: BackingKind::Bar {
                device: 1,
                region: 2,
                start: 0,
            },
            file: file.clone(),
            offset: 0x1000,
        };
        map.insert_backed(0, 0x1000, ram(&file, 0)).unwrap();
        map.insert_backed(0x1000, 0x1000, bar.clone()).unwrap();
        let kinds: Vec<_> = map
            .resolve(0, 0x2000)
            .unwrap()
            .iter()
            .map(|s| s.backing.kind)
            .collect();
        assert_eq!(kinds, [BackingKind::Ram, bar.kind]);
    }

    #[test]
    fn resolve_says_where_memory_ends() {
        let (map, file) = (AddressSpace::new(), file());
        map.insert_backed(0, 0x1000, ram(&file, 0)).unwrap();
        map.insert_io(0x2000, 0x1000, Arc::new(Recorder::default()))
            .unwrap();
        assert_eq!(
            map.resolve(0xfff, 2).unwrap_err(),
            AddressSpaceError::Unmapped { gpa: 0x1000 }
        );
        assert_eq!(
            map.resolve(0x2000, 1).unwrap_err(),
            AddressSpaceError::NotMemory { gpa: 0x2000 }
        );
        assert!(matches!(
            map.resolve(u64::MAX, 2),
            Err(AddressSpaceError::BadRange { .. })
        ));
        assert!(matches!(
            map.resolve(0, 0),
            Err(AddressSpaceError::BadRange { .. })
        ));
    }

    #[derive(Debug, Default)]
    struct Watcher(crate::sync::Mutex<Vec<(u64, bool)>>);

    impl MapWatcher for Watcher {
        fn memory_changed(&self, map: &AddressSpace, gpa: u64, len: u64) {
            let there = map.resolve(gpa, len).is_ok();
            self.0.lock().push((gpa, there));
        }
    }

    #[test]
    fn who_watches_hears_of_memory_that_comes_and_goes() {
        let map = AddressSpace::new();
        let watcher = Arc::new(Watcher::default());
        let weak: Weak<Watcher> = Arc::downgrade(&watcher);
        map.watch(weak);
        let file = file();
        map.insert_backed(0x1000, 0x1000, ram(&file, 0)).unwrap();
        map.insert_io(0x3000, 8, Arc::new(Recorder::default()))
            .unwrap();
        map.remove(0x3000, 8).unwrap();
        map.remove(0x1000, 0x1000).unwrap();
        assert_eq!(*watcher.0.lock(), [(0x1000, true), (0x1000, false)]);
        drop(watcher);
        map.insert_backed(0x1000, 0x1000, ram(&file, 0)).unwrap();
    }

    #[test]
    fn accesses_reach_their_device_and_nothing_beyond_it() {
        let (map, device) = (AddressSpace::new(), Arc::new(Recorder::default()));
        map.insert_io(0x1000, 0x10, device.clone()).unwrap();
        map.write(0x1004, &[1, 2]);
        map.write(0x100f, &[3, 4]);
        map.write(0x1010, &[5]);
        assert_eq!(*device.0.lock(), [(4, vec![1, 2])]);
        let mut data = [0xaa; 2];
        map.read(0x1008, &mut data);
        assert_eq!(data, [8, 0]);
        map.read(0x2000, &mut data);
        assert_eq!(data, [0xff, 0xff]);
    }

    #[test]
    fn overlaps_are_refused_and_removal_is_exact() {
        let (map, device) = (AddressSpace::new(), Arc::new(Recorder::default()));
        map.insert_io(0x1000, 0x1000, device.clone()).unwrap();
        for (gpa, len) in [(0x1000, 1), (0xfff, 2), (0x1fff, 1), (0, 0x10000)] {
            assert!(matches!(
                map.insert_io(gpa, len, device.clone()),
                Err(AddressSpaceError::Overlap { .. })
            ));
        }
        assert!(map.remove(0x1000, 0x800).is_err());
        map.remove(0x1000, 0x1000).unwrap();
        map.insert_io(0, 0x10000, device).unwrap();
    }

    proptest! {
        /// Against a model of one owner a byte.
        #[test]
        fn agrees_with_a_byte_map(ops in prop::collection::vec((0u64..64, 1u64..16, any::<bool>()), 1..40)) {
            let (map, file) = (AddressSpace::new(), file());
            let mut model: Vec<Option<u64>> = vec![None; 128];
            for (gpa, len, add) in ops {
                let range = gpa as usize..(gpa + len) as usize;
                if add {
                    let free = model[range.clone()].iter().all(Option::is_none);
                    let added = map.insert_backed(gpa, len, ram(&file, gpa)).is_ok();
                    prop_assert_eq!(free, added);
                    if added {
                        model[range].fill(Some(gpa));
                    }
                } else if map.remove(gpa, len).is_ok() {
                    prop_assert!(model[range.clone()].iter().all(|&o| o == Some(gpa)));
                    model[range].fill(None);
                }
                for (at, owner) in model.iter().enumerate() {
                    prop_assert_eq!(map.lookup(at as u64).map(|(start, ..)| start), *owner);
                }
            }
        }
    }
}
