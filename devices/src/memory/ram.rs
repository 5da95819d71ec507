//! Guest RAM: one sealed memfd, laid around the 32-bit hole.

use std::{fs::File, io, sync::Arc};

use rustix::{
    fs::{FallocateFlags, MemfdFlags},
    mm::Advice,
};
use thiserror::Error;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::{
    address_space::{AddressSpace, AddressSpaceError, Backing, BackingKind},
    slot::SlotMapping,
};
use crate::{
    GuestMemory,
    sys::{memfd, thp_alignment::AlignedHole},
};
use fanlight_arch::layout;

/// The smallest guest: a kernel and its page tables need about as much.
pub const MIN_SIZE: u64 = 16 << 20;

/// Size of the huge pages that back RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePageSize {
    /// 2 MiB pages.
    Size2M,
    /// 1 GiB pages.
    Size1G,
}

impl HugePageSize {
    /// Size in bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            HugePageSize::Size2M => 2 << 20,
            HugePageSize::Size1G => 1 << 30,
        }
    }
}

/// Why there is no guest RAM.
#[derive(Debug, Error)]
pub enum RamError {
    /// Not a size that RAM can have.
    #[error(
        "{size} bytes of memory: give a multiple of {}K, at least {}M", unit >> 10, MIN_SIZE >> 20
    )]
    BadSize {
        /// What was asked for, in bytes.
        size: u64,
        /// What it must be a multiple of.
        unit: u64,
    },
    /// More than the host has.
    #[error(
        "{} MiB of memory: the host has {} MiB with swap; give less memory",
        size >> 20,
        host >> 20
    )]
    TooLarge {
        /// What was asked for, in bytes.
        size: u64,
        /// The host's memory and swap, in bytes.
        host: u64,
    },
    /// Not enough free huge pages.
    #[error(
        "{} MiB of memory in huge pages: the host has too few free; reserve {} with \
         /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages",
        size >> 20,
        size / page.bytes(),
        page.bytes() >> 10
    )]
    NoHugePages {
        /// What was asked for, in bytes.
        size: u64,
        /// Page size asked for.
        page: HugePageSize,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A system call failed.
    #[error("cannot {action} for {} MiB of guest memory", size >> 20)]
    Host {
        /// What was tried.
        action: &'static str,
        /// What was asked for, in bytes.
        size: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The address space refused RAM.
    #[error("guest memory does not fit the address map")]
    Map(#[from] AddressSpaceError),
}

/// The guest's RAM.
#[derive(Clone, Debug)]
pub struct GuestRam {
    file: Arc<File>,
    mem: GuestMemory,
    size: u64,
}

impl GuestRam {
    /// Allocates `size` bytes. Pages of the default size come when they are touched; huge pages at once.
    pub fn new(size: u64, hugepages: Option<HugePageSize>) -> Result<Self, RamError> {
        let unit = hugepages.map_or(layout::PAGE_SIZE, HugePageSize::bytes);
        if size < MIN_SIZE || !size.is_multiple_of(unit) {
            return Err(RamError::BadSize { size, unit });
        }
        let info = rustix::system::sysinfo();
        let host =
            (u128::from(info.totalram) + u128::from(info.totalswap)) * u128::from(info.mem_unit);
        let host = u64::try_from(host).unwrap_or(u64::MAX);
        if size > host {
            return Err(RamError::TooLarge { size, host });
        }

        let file = Self::memfd(size, hugepages)?;
        let fail = |error: &dyn std::error::Error| RamError::Host {
            action: "map memory",
            size,
            source: io::Error::other(error.to_string()),
        };
        let mut offset = 0;
        let mut regions = Vec::new();
        for (gpa, len) in layout::ram_ranges(size) {
            let backing = FileOffset::from_arc(file.clone(), offset);
            offset += len;
            let _hole = AlignedHole::new(len as usize);
            let region = GuestRegionMmap::from_range(gpa, len as usize, Some(backing));
            regions.push(region.map_err(|error| fail(&error))?);
        }
        let mem = GuestMemory::from_regions(regions).map_err(|error| fail(&error))?;
        let ram = Self { file, mem, size };
        for slot in ram.slots() {
            // Only hints: a kernel without them serves the guest as well.
            let _ = advise(&slot, Advice::LinuxDontDump);
            if hugepages.is_none() {
                let _ = advise(&slot, Advice::LinuxHugepage);
            }
        }
        Ok(ram)
    }

    /// The memory file. Huge pages are all allocated now: touching one that the host does not have is a
    /// SIGBUS.
    fn memfd(size: u64, hugepages: Option<HugePageSize>) -> Result<Arc<File>, RamError> {
        let huge_pages = match hugepages {
            None => MemfdFlags::empty(),
            Some(HugePageSize::Size2M) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
            Some(HugePageSize::Size1G) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
        };
        let file =
            memfd::sized("fanlight-ram", size, huge_pages).map_err(|source| RamError::Host {
                action: "make a memory file",
                size,
                source,
            })?;
        if let Some(page) = hugepages {
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size).map_err(|source| {
                RamError::NoHugePages {
                    size,
                    page,
                    source: source.into(),
                }
            })?;
        }
        Ok(Arc::new(file))
    }

    /// RAM as devices and the loader use it.
    pub fn memory(&self) -> &GuestMemory {
        &self.mem
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The memory file, for other processes that map it.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// The mappings to show to the guest.
    pub fn slots(&self) -> impl Iterator<Item = SlotMapping> + '_ {
        self.mem.iter().filter_map(|region| {
            let host = region
                .get_host_address(vm_memory::MemoryRegionAddress(0))
                .ok()?;
            Some(SlotMapping {
                gpa: region.start_addr().0,
                len: region.len(),
                host: host as u64,
                readonly: false,
            })
        })
    }

    /// Enters RAM into the map.
    pub fn insert_into(&self, map: &AddressSpace) -> Result<(), AddressSpaceError> {
        let mut offset = 0;
        for (GuestAddress(gpa), len) in layout::ram_ranges(self.size) {
            map.insert_backed(
                gpa,
                len,
                Backing {
                    kind: BackingKind::Ram,
                    file: self.file.clone(),
                    offset,
                },
            )?;
            offset += len;
        }
        Ok(())
    }

    /// Returns all pages to the host, for a machine reset. RAM reads as zeroes afterwards.
    pub fn clear(&self) -> Result<(), RamError> {
        rustix::fs::fallocate(
            &*self.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            0,
            self.size,
        )
        .map_err(|source| RamError::Host {
            action: "clear memory",
            size: self.size,
            source: source.into(),
        })
    }
}

/// madvise on a mapping of RAM.
fn advise(slot: &SlotMapping, advice: Advice) -> rustix::io::Result<()> {
    // SAFETY: the range is a live mapping of this process, and neither hint changes its content.
    unsafe { rustix::mm::madvise(slot.host as *mut _, slot.len as usize, advice) }
}

#[cfg(test)]
mod tests {
    use rustix::fs::SealFlags;
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn is_sealed_against_resizing_but_not_writing() {
        let ram = GuestRam::new(64 << 20, None).unwrap();
        let seals = rustix::fs::fcntl_get_seals(&*ram.file).unwrap();
        assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW));
        assert!(!seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE));
        assert!(ram.file.set_len(0).is_err());
    }

    #[test]
    fn the_map_finds_both_halves_in_one_file() {
        let ram = GuestRam::new(4 << 30, None).unwrap();
        let map = AddressSpace::new();
        ram.insert_into(&map).unwrap();
        let low = map.resolve(layout::LOW_RAM_END - 1, 1).unwrap();
        let high = map.resolve(layout::HIGH_RAM_START, 1).unwrap();
        assert_eq!(low[0].backing.offset, layout::LOW_RAM_END - 1);
        assert_eq!(high[0].backing.offset, layout::LOW_RAM_END);
        assert!(map.resolve(layout::LOW_RAM_END - 1, 2).is_err());
        assert_eq!(ram.slots().count(), 2);
    }

    #[test]
    fn memory_above_4_gib_is_other_memory() {
        let ram = GuestRam::new(4 << 30, None).unwrap();
        let [low, high] = [0, layout::HIGH_RAM_START].map(GuestAddress);
        ram.memory().write_obj(1u64, low).unwrap();
        ram.memory().write_obj(2u64, high).unwrap();
        assert_eq!(ram.memory().read_obj::<u64>(low).unwrap(), 1);
        assert_eq!(ram.memory().read_obj::<u64>(high).unwrap(), 2);
    }

    #[test]
    fn huge_pages_can_be_mapped() {
        let ram = GuestRam::new((4 << 30) + layout::PAGE_SIZE, None).unwrap();
        for slot in ram.slots() {
            assert_eq!(slot.host % HugePageSize::Size2M.bytes(), 0);
            assert_eq!(slot.gpa % HugePageSize::Size2M.bytes(), 0);
        }
    }

    #[test]
    fn clear_zeroes() {
        let ram = GuestRam::new(MIN_SIZE, None).unwrap();
        ram.memory().write_obj(7u64, GuestAddress(0x1000)).unwrap();
        ram.clear().unwrap();
        assert_eq!(
            ram.memory().read_obj::<u64>(GuestAddress(0x1000)).unwrap(),
            0
        );
    }

    #[test]
    fn absurd_sizes_are_refused() {
        assert!(matches!(
            GuestRam::new(0, None),
            Err(RamError::BadSize { .. })
        ));
        assert!(matches!(
            GuestRam::new(MIN_SIZE + 1, None),
            Err(RamError::BadSize { .. })
        ));
        assert!(matches!(
            GuestRam::new(1 << 60, None),
            Err(RamError::TooLarge { .. })
        ));
    }
}
