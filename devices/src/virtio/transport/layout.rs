//! Layout of the BAR, and numbers of the specification (Virtio 1.3, 4.1).

use crate::pci::{Capability, PBA_ENTRY, TABLE_ENTRY};

pub(super) const VENDOR_ID: u16 = 0x1af4;
/// The PCI device id of a modern device is this plus its virtio device id.
pub(super) const DEVICE_ID_BASE: u16 = 0x1040;
/// Non-transitional devices have at least this revision.
pub(super) const REVISION_ID: u8 = 1;

/// The BAR and its regions.
pub(super) const BAR: u8 = 0;
pub(super) const COMMON: u64 = 0x0000;
pub(super) const COMMON_LEN: u64 = 0x40;
pub(super) const ISR: u64 = 0x1000;
pub(super) const DEVICE: u64 = 0x2000;
pub(super) const NOTIFY: u64 = 0x3000;
pub(super) const MSIX_TABLE: u64 = 0x4000;
pub(super) const MSIX_PBA: u64 = 0x7000;
pub(super) const BAR_SIZE: u64 = 0x8000;
/// Length of each region that has its own page.
pub(super) const REGION_LEN: u64 = 0x1000;
/// Each queue has its own doorbell: ioeventfd distinguishes queues by address.
pub(super) const NOTIFY_OFF_MULTIPLIER: u64 = 4;

/// The most queues. Their doorbells, and their MSI-X vectors with one for configuration, fit their regions.
pub(super) const MAX_QUEUES: usize = 256;
const _: () = assert!(MAX_QUEUES as u64 * NOTIFY_OFF_MULTIPLIER <= REGION_LEN);
const _: () = assert!((MAX_QUEUES as u64 + 1) * TABLE_ENTRY <= MSIX_PBA - MSIX_TABLE);
const _: () = assert!((MAX_QUEUES as u64 / 64 + 1) * PBA_ENTRY <= BAR_SIZE - MSIX_PBA);

pub(super) const CAP_ID_VENDOR: u8 = 0x09;
pub(super) const VIRTIO_PCI_CAP_COMMON_CFG: u8 = 1;
pub(super) const VIRTIO_PCI_CAP_NOTIFY_CFG: u8 = 2;
pub(super) const VIRTIO_PCI_CAP_ISR_CFG: u8 = 3;
pub(super) const VIRTIO_PCI_CAP_DEVICE_CFG: u8 = 4;
pub(super) const VIRTIO_PCI_CAP_PCI_CFG: u8 = 5;
/// Offsets in the capability (`struct virtio_pci_cap`).
pub(super) const CAP_BAR: usize = 4;
pub(super) const CAP_OFFSET: usize = 8;
pub(super) const CAP_LENGTH: usize = 12;
pub(super) const CAP_PCI_CFG_DATA: usize = 16;

/// MSI-X Message Control follows the capability id and the next pointer.
pub(super) const MSIX_CONTROL: usize = 2;
pub(super) const VIRTIO_MSI_NO_VECTOR: u16 = 0xffff;

pub(super) const STATUS_DRIVER_OK: u8 = 4;
pub(super) const STATUS_FEATURES_OK: u8 = 8;
pub(super) const STATUS_DEVICE_NEEDS_RESET: u8 = 64;

pub(super) const VIRTIO_F_INDIRECT_DESC: u64 = 1 << 28;
pub(super) const VIRTIO_F_EVENT_IDX: u64 = 1 << 29;
pub(super) const VIRTIO_F_VERSION_1: u64 = 1 << 32;
pub(super) const TRANSPORT_FEATURES: u64 =
    VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX | VIRTIO_F_VERSION_1;

/// ISR status: no interrupt pending. It matters only without MSI-X, but drivers read it.
pub(super) const ISR_NONE: u8 = 0;

/// A vendor-specific capability (`struct virtio_pci_cap`), followed by `more`.
pub(super) fn capability(kind: u8, offset: u64, len: u64, more: &[u8]) -> Capability {
    let size = CAP_PCI_CFG_DATA + more.len();
    let mut body = vec![size as u8, kind, BAR, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((len as u32).to_le_bytes());
    body.extend(more);
    Capability {
        id: CAP_ID_VENDOR,
        body,
        writable: vec![],
    }
}
