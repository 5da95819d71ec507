//! Memory that a device shares with its driver (Virtio 1.3, 2.10 and 4.1.4.7): a separate BAR, and the capability that
//! describes it.

use super::layout::CAP_ID_VENDOR;
use crate::pci::{BarContent, BarKind, Bars, Capability, ConfigSpace};

/// The first BAR after the 64-bit BAR of the registers.
const BAR: u8 = 2;
const VIRTIO_PCI_CAP_SHARED_MEMORY_CFG: u8 = 8;
/// Length of `struct virtio_pci_cap64`: Linux accepts no other length.
const CAP64_LEN: u8 = 24;

/// A device's shared memory.
#[derive(Clone)]
pub struct SharedMemory {
    /// Shared memory id (`shmid`).
    pub id: u8,
    /// Length in bytes: a power of two.
    pub len: u64,
    /// Content of the BAR.
    pub content: BarContent,
}

impl SharedMemory {
    pub(super) fn capability(&self) -> Capability {
        let (low, high) = (self.len as u32, (self.len >> 32) as u32);
        let mut body = vec![
            CAP64_LEN,
            VIRTIO_PCI_CAP_SHARED_MEMORY_CFG,
            BAR,
            self.id,
            0,
            0,
        ];
        // The whole BAR: offset and length, low halves first.
        for word in [0, low, 0, high] {
            body.extend(word.to_le_bytes());
        }
        Capability {
            id: CAP_ID_VENDOR,
            body,
            writable: vec![],
        }
    }

    pub(super) fn add_to(self, bars: &mut Bars, config: &mut ConfigSpace) {
        let kind = BarKind::Memory64 { prefetchable: true };
        bars.add(config, BAR.into(), kind, self.len, self.content);
    }
}
