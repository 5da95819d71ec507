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
#[path = "address_space_tests.rs"]
mod tests;
