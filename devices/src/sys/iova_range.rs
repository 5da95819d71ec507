//! Ranges of I/O virtual addresses as the kernel lists them.

use std::ops::RangeInclusive;

use zerocopy::{FromBytes, Immutable, KnownLayout};

/// The most IOVA ranges that are asked for. A host has one more than it has reserved windows, of which there are a
/// handful.
pub(super) const MAX_IOVA_RANGES: usize = 256;

/// `struct iommu_iova_range` and `struct vfio_iova_range`: the last address is in the range.
#[derive(Clone, Copy, Default, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct IovaRange {
    start: u64,
    last: u64,
}

impl From<IovaRange> for RangeInclusive<u64> {
    fn from(range: IovaRange) -> Self {
        range.start..=range.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_as_large_as_the_kernels() {
        assert_eq!(size_of::<IovaRange>(), 16);
    }
}
