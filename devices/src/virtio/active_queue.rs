//! A queue as the transport hands it to a device.

use std::sync::{Arc, atomic::AtomicU64};

use vmm_sys_util::eventfd::EventFd;

use crate::hypervisor::MsiVector;

/// A queue that the driver enabled.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Index of the queue in the device.
    pub index: u16,
    /// Addresses validated against guest RAM, EVENT_IDX applied.
    pub queue: virtio_queue::Queue,
    /// Signalled when the driver kicks the queue.
    pub kick: EventFd,
    /// The queue's MSI-X vector; `None` when the driver chose NO_VECTOR or MSI-X is off.
    pub vector: Option<Arc<dyn MsiVector>>,
    /// Counts requests and bytes.
    pub counters: Arc<QueueCounters>,
}

/// What a queue has done since its function was made.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// Requests given back.
    pub requests: AtomicU64,
    /// Bytes that the driver gave.
    pub from_guest: AtomicU64,
    /// Bytes that the driver got.
    pub to_guest: AtomicU64,
}
