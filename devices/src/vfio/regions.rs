//! BARs of a host device mapped into this process, and the parts of them that the guest reaches without an exit.

use std::{fs::File, io, ops::Range, sync::Arc};

use fanlight_arch::layout::PAGE_SIZE;

use crate::sys::{reservation::Reservation, vfio::RegionInfo};

/// The largest page that a processor maps. A BAR is aligned to its size or to this, so that the kernel can use huge
/// pages for it (Linux `drivers/vfio/pci/vfio_pci_core.c`, huge faults).
const MAX_ALIGN: u64 = 1 << 30;

/// The mappable parts of a region, mapped at their offsets within one reservation.
///
/// This process neither reads nor writes there: the mapping is for memory slots and the IOMMU. The rest stays without
/// access.
#[derive(Debug)]
pub struct RegionMapping {
    reservation: Reservation,
    /// Keeps the device open.
    _file: Arc<File>,
}

impl RegionMapping {
    /// Maps `parts` (offset and length, whole pages) of a region of `file`.
    pub fn new(file: &Arc<File>, region: &RegionInfo, parts: &[Range<u64>]) -> io::Result<Self> {
        let align = region.size.clamp(PAGE_SIZE, MAX_ALIGN);
        let len = usize::try_from(region.size).map_err(io::Error::other)?;
        let reservation = Reservation::aligned(len, align as usize)?;
        for part in parts {
            let inside = part.start < part.end && part.end <= region.size;
            if !inside {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let (len, at) = (part.end - part.start, region.start + part.start);
            reservation.map(part.start, len, file, at, region.writable)?;
        }
        Ok(Self {
            reservation,
            _file: file.clone(),
        })
    }

    /// Address of the byte at `offset` of the region.
    pub fn host(&self, offset: u64) -> *mut u8 {
        self.reservation.address(offset).cast()
    }
}

/// The parts of a region that the guest may reach directly: whole mappable pages, without `trapped`. In order, not
/// overlapping, not adjoining.
pub fn direct_parts(region: &RegionInfo, trapped: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut parts: Vec<Range<u64>> = region
        .mappable
        .iter()
        .filter_map(|&(offset, len)| {
            let end = offset.checked_add(len)?.min(region.size);
            let (start, end) = (offset.checked_next_multiple_of(PAGE_SIZE)?, round_down(end));
            (start < end).then_some(start..end)
        })
        .collect();
    parts.sort_by_key(|part| part.start);
    for hole in trapped {
        let hole = round_down(hole.start)..hole.end.next_multiple_of(PAGE_SIZE);
        parts = parts
            .into_iter()
            .flat_map(|part| {
                let before = part.start..part.end.min(hole.start);
                let after = part.start.max(hole.end)..part.end;
                [before, after]
            })
            .filter(|part| part.start < part.end)
            .collect();
    }
    let mut merged: Vec<Range<u64>> = Vec::new();
    for part in parts {
        match merged.last_mut() {
            Some(last) if part.start <= last.end => last.end = last.end.max(part.end),
            _ => merged.push(part),
        }
    }
    merged
}

fn round_down(value: u64) -> u64 {
    value & !(PAGE_SIZE - 1)
}

#[cfg(test)]
#[allow(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges are what is tested"
)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn region(size: u64, mappable: &[(u64, u64)]) -> RegionInfo {
        RegionInfo {
            index: 0,
            start: 0,
            size,
            writable: true,
            mappable: mappable.into(),
        }
    }

    #[test]
    fn the_msix_table_is_cut_out_in_pages() {
        let bar = region(0x4000, &[(0, 0x4000)]);
        assert_eq!(direct_parts(&bar, &[]), [0..0x4000]);
        assert_eq!(
            direct_parts(&bar, &[0..0x30, 0x2000..0x2008]),
            [0x1000..0x2000, 0x3000..0x4000]
        );
        assert_eq!(direct_parts(&bar, &[0xff0..0x1010]), [0x2000..0x4000]);
        assert_eq!(direct_parts(&bar, &[0..0x4000]), []);
    }

    #[test]
    fn sparse_areas_and_small_bars_are_honoured() {
        let bar = region(0x8000, &[(0x6000, 0x2000), (0, 0x1000), (0x1000, 0x1000)]);
        assert_eq!(direct_parts(&bar, &[]), [0..0x2000, 0x6000..0x8000]);
        assert_eq!(direct_parts(&region(0x100, &[(0, 0x100)]), &[]), []);
        assert_eq!(direct_parts(&region(0x2000, &[(0x800, 0x1000)]), &[]), []);
        assert_eq!(direct_parts(&region(0x2000, &[(u64::MAX, 2)]), &[]), []);
    }

    #[test]
    fn a_mapping_is_aligned_and_the_rest_has_no_access() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x40_0000).unwrap();
        let bar = region(0x40_0000, &[]);
        let mapping = RegionMapping::new(&Arc::new(file), &bar, &[0x1000..0x2000]).unwrap();
        assert_eq!(mapping.host(0).addr() % 0x40_0000, 0);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let line = |at: *mut u8| {
            let start = format!("{:x}-", at.addr());
            maps.lines()
                .find(|line| line.starts_with(&start))
                .map(str::to_owned)
        };
        assert!(line(mapping.host(0x1000)).unwrap().contains("rw-s"));
        assert!(line(mapping.host(0x2000)).unwrap().contains("---p"));
    }

    #[test]
    fn parts_past_the_end_are_refused() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let bar = region(0x2000, &[]);
        assert!(RegionMapping::new(&file, &bar, &[0x1000..0x3000]).is_err());
    }

    proptest! {
        /// Against a model of one flag a page.
        #[test]
        fn parts_are_what_is_mappable_and_not_trapped(
            mappable in prop::collection::vec((0u64..16, 0u64..8), 0..4),
            trapped in prop::collection::vec((0u64..0x10000, 1u64..0x3000), 0..4),
        ) {
            let mappable: Vec<_> = mappable.iter().map(|&(at, len)| (at << 12, len << 12)).collect();
            let trapped: Vec<_> = trapped.iter().map(|&(at, len)| at..at + len).collect();
            let bar = region(0x10000, &mappable);
            let parts = direct_parts(&bar, &trapped);
            for page in 0..16u64 {
                let (start, end) = (page << 12, (page + 1) << 12);
                let can = mappable.iter().any(|&(at, len)| at <= start && end <= at + len);
                let must_not = trapped.iter().any(|hole| hole.start < end && start < hole.end);
                let is = parts.iter().any(|part| part.start <= start && end <= part.end);
                prop_assert_eq!(is, can && !must_not);
            }
            prop_assert!(parts.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}
