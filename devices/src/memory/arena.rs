//! A range of guest-physical addresses, shown by one memory slot, into which files are mapped and unmapped.
//!
//! The range is reserved once, without access. A file is mapped over the reservation (`MAP_FIXED`), and unmapping
//! restores the reservation. So each page is reserved or mapped at every moment. A guest that touches a page
//! without a file gets an error from KVM. KVM follows both through its notifier of host page tables: neither waits
//! for a vCPU or a memory slot.
//!
//! If a file refuses to be mapped, a page can be left unreserved: Linux before 6.12 removes the reservation before
//! it asks the file. So the range lies where Linux puts no mapping that does not ask for the address
//! ([`Reservation::isolated`]). No other mapping can come to lie there before the reservation is restored.

use std::{collections::BTreeMap, fs::File, io, mem::ManuallyDrop, ops::Bound, sync::Arc};

use fanlight_arch::layout::PAGE_SIZE;
use rustix::fs::{SeekFrom, seek};
use thiserror::Error;

use super::limits::{Charge, Quota, arena_mappings};
use crate::sys::reservation::Reservation;

/// Why something could not be mapped or unmapped.
#[derive(Debug, Error)]
pub enum ArenaError {
    /// Not whole pages, or none.
    #[error("{len:#x} bytes at {offset:#x} are not whole pages")]
    Unaligned {
        /// Where in the arena.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Beyond the end.
    #[error("{len:#x} bytes at {offset:#x} do not lie within the {size:#x} bytes of the arena")]
    Bounds {
        /// Where in the arena.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// The arena's size.
        size: u64,
    },
    /// Another mapping overlaps.
    #[error("{len:#x} bytes at {offset:#x} overlap what is mapped at {other:#x}")]
    Overlap {
        /// Where in the arena.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Where the other mapping starts.
        other: u64,
    },
    /// The file is shorter than the mapping.
    #[error("the file has {size:#x} bytes, fewer than the {len:#x} to be mapped")]
    Short {
        /// Length in bytes.
        len: u64,
        /// Size of the file.
        size: u64,
    },
    /// The process would have more mappings than it may.
    #[error(
        "{0} pieces of it are as many as this process may map beside its own memory: raise vm.max_map_count on the host"
    )]
    TooMany(usize),
    /// Nothing starts there.
    #[error("nothing is mapped at {0:#x}")]
    NotMapped(u64),
    /// The host failed.
    #[error("cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A page lost its reservation, which cannot be restored: the guest must not reach it any more.
    #[error("the host lost a part of the arena")]
    Lost,
}

impl ArenaError {
    /// Whether a limit or a failure of the host is the cause, and not what was asked for.
    pub fn is_of_host(&self) -> bool {
        match self {
            Self::TooMany(_) | Self::Host { .. } | Self::Lost => true,
            Self::Unaligned { .. }
            | Self::Bounds { .. }
            | Self::Overlap { .. }
            | Self::Short { .. }
            | Self::NotMapped(_) => false,
        }
    }
}

/// The range and what is mapped in it.
#[derive(Debug)]
pub struct Arena {
    /// Not dropped once a page is lost: a mapping of another part of this process may lie there.
    reservation: ManuallyDrop<Reservation>,
    len: u64,
    /// Lengths, by offset; never overlapping.
    mapped: BTreeMap<u64, u64>,
    /// Runs of the reservation between them. To the host kernel each is a mapping too.
    gaps: usize,
    mappings: Charge,
    lost: bool,
}

impl Arena {
    /// Reserves `len` bytes, whole pages, of address space and no memory.
    pub fn new(len: u64) -> Result<Self, ArenaError> {
        if len == 0 || !len.is_multiple_of(PAGE_SIZE) {
            return Err(ArenaError::Unaligned { offset: 0, len });
        }
        Self::within(len, arena_mappings())
    }

    fn within(len: u64, quota: Arc<Quota>) -> Result<Self, ArenaError> {
        let reservation = Reservation::isolated(len).map_err(|source| ArenaError::Host {
            action: "reserve addresses for the GPU's memory",
            source,
        })?;
        let mappings = quota.charge(1).ok_or(ArenaError::TooMany(0))?;
        Ok(Self {
            reservation: ManuallyDrop::new(reservation),
            len,
            mapped: BTreeMap::new(),
            gaps: 1,
            mappings,
            lost: false,
        })
    }

    /// Host-virtual address of its start, for the memory slot. Nothing else may use it.
    pub fn host_address(&self) -> u64 {
        self.reservation.address(0).addr() as u64
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.mapped.is_empty()
    }

    /// Maps the first `len` bytes of `file` at `offset`, for reading, and for writing if `writable`.
    pub fn map(
        &mut self,
        offset: u64,
        len: u64,
        file: &File,
        writable: bool,
    ) -> Result<(), ArenaError> {
        let end = self.check(offset, len)?;
        let gaps = self.gaps - 1 + self.gaps_beside(offset, end);
        // `fstat` does not report the size of a dma-buf. The exporter of the file may share its position.
        let size = seek(file, SeekFrom::End(0)).map_err(|error| ArenaError::Host {
            action: "find the size of the GPU's memory",
            source: error.into(),
        })?;
        if size < len {
            return Err(ArenaError::Short { len, size });
        }
        // Never below zero: a mapping replaces one run of the reservation at most.
        let more = 1 + gaps - self.gaps;
        if !self.mappings.grow(more as u64) {
            return Err(ArenaError::TooMany(self.mapped.len()));
        }
        if let Err(source) = self.reservation.map(offset, len, file, 0, writable) {
            self.mappings.shrink_to(self.count());
            if !self.reservation.is_intact(offset, len) {
                self.reserve(offset, len)?;
            }
            return Err(ArenaError::Host {
                action: "map the GPU's memory",
                source,
            });
        }
        self.mapped.insert(offset, len);
        self.gaps = gaps;
        Ok(())
    }

    /// Unmaps what was mapped at `offset`.
    pub fn unmap(&mut self, offset: u64) -> Result<(), ArenaError> {
        let len = *self
            .mapped
            .get(&offset)
            .ok_or(ArenaError::NotMapped(offset))?;
        self.reserve(offset, len)?;
        self.mapped.remove(&offset);
        let gaps = self.gaps + 1 - self.gaps_beside(offset, offset + len);
        self.gaps = gaps;
        self.mappings.shrink_to(self.count());
        Ok(())
    }

    /// Unmaps everything.
    pub fn clear(&mut self) -> Result<(), ArenaError> {
        if !self.mapped.is_empty() {
            self.reserve(0, self.len)?;
            self.mapped.clear();
            self.gaps = 1;
            self.mappings.shrink_to(self.count());
        }
        Ok(())
    }

    /// Checks a mapping, and returns where it ends.
    fn check(&self, offset: u64, len: u64) -> Result<u64, ArenaError> {
        if self.lost {
            return Err(ArenaError::Lost);
        }
        if len == 0 || !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(ArenaError::Unaligned { offset, len });
        }
        let end = offset.checked_add(len).filter(|end| *end <= self.len);
        let end = end.ok_or(ArenaError::Bounds {
            offset,
            len,
            size: self.len,
        })?;
        let before = (Bound::Unbounded, Bound::Excluded(end));
        match self.mapped.range(before).next_back() {
            Some((&other, &other_len)) if other + other_len > offset => {
                Err(ArenaError::Overlap { offset, len, other })
            }
            _ => Ok(end),
        }
    }

    /// On how many sides of a range the reservation continues. Nothing is mapped in the range.
    fn gaps_beside(&self, offset: u64, end: u64) -> usize {
        let before = self.mapped.range(..offset).next_back();
        let gap_before = before.map_or(offset > 0, |(&start, &len)| start + len < offset);
        let gap_after = end < self.len && !self.mapped.contains_key(&end);
        usize::from(gap_before) + usize::from(gap_after)
    }

    /// Mappings that the host kernel counts for it.
    fn count(&self) -> u64 {
        (self.mapped.len() + self.gaps) as u64
    }

    /// Restores the reservation.
    fn reserve(&mut self, offset: u64, len: u64) -> Result<(), ArenaError> {
        self.reservation.unmap(offset, len).map_err(|_| {
            self.lost = true;
            ArenaError::Lost
        })
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if !self.lost {
            // SAFETY: the reservation is not used after this.
            unsafe { ManuallyDrop::drop(&mut self.reservation) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, ptr};

    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    const PAGES: u64 = 16;

    /// A file of `pages` pages, each of whose bytes is `fill`.
    fn file(pages: u64, fill: u8) -> File {
        let mut file = File::from(memfd_create("blob", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(&vec![fill; (pages * PAGE_SIZE) as usize])
            .unwrap();
        file
    }

    /// A byte of a page, or `None` where nothing can be read: as the guest sees it.
    fn seen(arena: &Arena, page: u64) -> Option<u8> {
        let mut byte = 0_u8;
        let local = libc::iovec {
            iov_base: ptr::from_mut(&mut byte).cast(),
            iov_len: 1,
        };
        let remote = libc::iovec {
            iov_base: arena.reservation.address(page * PAGE_SIZE + 77),
            iov_len: 1,
        };
        // SAFETY: writes one byte to `byte`; an address that cannot be read is an error.
        let read = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
        (read == 1).then_some(byte)
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut arena = Arena::new(PAGES * PAGE_SIZE).unwrap();
        let two = file(2, 1);
        let mut refused = |offset, len| arena.map(offset, len, &two, true).unwrap_err();
        assert!(matches!(
            refused(1, PAGE_SIZE),
            ArenaError::Unaligned { .. }
        ));
        assert!(matches!(refused(0, 0), ArenaError::Unaligned { .. }));
        assert!(matches!(refused(0, 5), ArenaError::Unaligned { .. }));
        let last = u64::MAX - PAGE_SIZE + 1;
        assert!(matches!(
            refused(last, PAGE_SIZE),
            ArenaError::Bounds { .. }
        ));
        assert!(matches!(
            refused(last, 2 * PAGE_SIZE),
            ArenaError::Bounds { .. }
        ));
        let end = (PAGES - 1) * PAGE_SIZE;
        assert!(matches!(
            refused(end, 2 * PAGE_SIZE),
            ArenaError::Bounds { .. }
        ));
        assert!(matches!(
            refused(0, 3 * PAGE_SIZE),
            ArenaError::Short { .. }
        ));
        arena.map(PAGE_SIZE, 2 * PAGE_SIZE, &two, true).unwrap();
        for offset in [0, 1, 2] {
            let result = arena.map(offset * PAGE_SIZE, 2 * PAGE_SIZE, &two, true);
            assert!(
                matches!(result, Err(ArenaError::Overlap { .. })),
                "{offset}"
            );
        }
        arena.map(0, PAGE_SIZE, &two, true).unwrap();
        assert!(matches!(
            arena.unmap(2 * PAGE_SIZE),
            Err(ArenaError::NotMapped(_))
        ));
    }

    /// Mappings of this process within the arena, as the kernel counts them.
    fn mappings(arena: &Arena) -> usize {
        let start = arena.host_address();
        let range = start..start + arena.len();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let starts = maps.lines().filter_map(|line| line.split('-').next());
        let starts = starts.map(|start| u64::from_str_radix(start, 16).unwrap());
        starts.filter(|start| range.contains(start)).count()
    }

    #[test]
    fn fifty_thousand_at_once_and_a_hundred_thousand_one_after_the_other() {
        const COUNT: u64 = 50_000;
        let mut arena = Arena::new(256 << 20).unwrap();
        let one = file(1, 1);
        for page in 0..COUNT {
            arena.map(page * PAGE_SIZE, PAGE_SIZE, &one, true).unwrap();
        }
        for turn in 0..100_000_u64 {
            let page = turn % (arena.len() / PAGE_SIZE - COUNT) + COUNT;
            arena.map(page * PAGE_SIZE, PAGE_SIZE, &one, true).unwrap();
            assert!(arena.unmap(page * PAGE_SIZE).is_ok(), "{turn}");
        }
        assert_eq!(arena.mapped.len(), COUNT as usize);
        assert_eq!(arena.gaps, 1);
        assert_eq!(seen(&arena, COUNT - 1), Some(1));
        assert_eq!(seen(&arena, COUNT), None);
    }

    #[test]
    fn the_last_mappings_of_the_process_are_left_alone() {
        let quota = Quota::new(6);
        let mut arena = Arena::within(PAGES * PAGE_SIZE, quota.clone()).unwrap();
        let one = file(1, 1);
        let mut map = |page: u64| arena.map(page * PAGE_SIZE, PAGE_SIZE, &one, true);
        // Two and three runs of the reservation.
        assert!(map(2).is_ok());
        assert!(map(4).is_ok());
        assert!(matches!(map(6), Err(ArenaError::TooMany(2))));
        assert!(map(3).is_ok());
        assert!(map(5).is_ok());
        assert!(matches!(map(6), Err(ArenaError::TooMany(4))));
        arena.unmap(2 * PAGE_SIZE).unwrap();
        arena.map(0, PAGE_SIZE, &one, true).unwrap();
        assert_eq!(arena.mapped.len() + arena.gaps, mappings(&arena));
        // Others have what is left.
        let other = Arena::within(PAGE_SIZE, quota.clone());
        assert!(matches!(other, Err(ArenaError::TooMany(0))));
        arena.unmap(3 * PAGE_SIZE).unwrap();
        arena.unmap(4 * PAGE_SIZE).unwrap();
        assert!(Arena::within(PAGE_SIZE, quota.clone()).is_ok());
        arena.clear().unwrap();
        drop(arena);
        assert_eq!(quota.used(), 0);
    }

    #[test]
    fn a_file_that_cannot_be_mapped_leaves_the_reservation() {
        let mut arena = Arena::new(PAGES * PAGE_SIZE).unwrap();
        let mut readonly = tempfile::NamedTempFile::new().unwrap();
        readonly.write_all(&[1; 4096]).unwrap();
        let readonly = File::open(readonly.path()).unwrap();
        assert!(matches!(
            arena.map(0, PAGE_SIZE, &readonly, true),
            Err(ArenaError::Host { .. })
        ));
        arena.map(0, PAGE_SIZE, &readonly, false).unwrap();
        assert_eq!(seen(&arena, 0), Some(1));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Map { page: u64, pages: u64, fill: u8 },
        Unmap { page: u64 },
        Clear,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..PAGES + 2, 0..5_u64, 1..=255_u8)
                .prop_map(|(page, pages, fill)| Step::Map { page, pages, fill }),
            4 => (0..PAGES).prop_map(|page| Step::Unmap { page }),
            1 => Just(Step::Clear),
        ]
    }

    proptest! {
        /// The guest sees of each page what a table of pages says, and nothing anywhere else.
        #[test]
        fn it_is_a_table_of_pages(steps in prop::collection::vec(step(), 1..60)) {
            let mut arena = Arena::new(PAGES * PAGE_SIZE).unwrap();
            let mut model = [None; PAGES as usize];
            let mut starts = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Map { page, pages, fill } => {
                        let fits = pages > 0
                            && page + pages <= PAGES
                            && (page..page + pages).all(|p| model[p as usize].is_none());
                        let file = file(pages, fill);
                        let result =
                            arena.map(page * PAGE_SIZE, pages * PAGE_SIZE, &file, fill % 2 == 0);
                        prop_assert_eq!(result.is_ok(), fits);
                        if fits {
                            starts.insert(page, pages);
                            model[page as usize..(page + pages) as usize].fill(Some(fill));
                        }
                    }
                    Step::Unmap { page } => {
                        let pages = starts.remove(&page);
                        prop_assert_eq!(arena.unmap(page * PAGE_SIZE).is_ok(), pages.is_some());
                        let pages = pages.unwrap_or(0);
                        model[page as usize..(page + pages) as usize].fill(None);
                    }
                    Step::Clear => {
                        arena.clear().unwrap();
                        starts.clear();
                        model.fill(None);
                    }
                }
                for page in 0..PAGES {
                    prop_assert_eq!(seen(&arena, page), model[page as usize]);
                }
                let runs = model
                    .chunk_by(|one, other| one.is_none() && other.is_none())
                    .filter(|run| run[0].is_none());
                prop_assert_eq!(arena.gaps, runs.count());
            }
        }
    }
}
