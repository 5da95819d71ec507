//! Queues: their setup by the driver, their handover to the device, and their reset.

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::layout::VIRTIO_MSI_NO_VECTOR;
use crate::GuestMemory;

/// Registers of one queue, as the driver writes them before it enables the queue.
#[derive(Clone, Copy, Debug)]
pub struct QueueRegisters {
    pub size: u16,
    pub vector: u16,
    pub enabled: bool,
    pub desc: u64,
    pub driver: u64,
    pub device: u64,
}

impl QueueRegisters {
    /// The registers after a reset.
    pub fn new(size: u16) -> Self {
        Self {
            size,
            vector: VIRTIO_MSI_NO_VECTOR,
            enabled: false,
            desc: 0,
            driver: 0,
            device: 0,
        }
    }

    /// Builds the queue if the driver's setup is valid. The size must be a power of two of at most `max`, and the rings
    /// aligned and in RAM.
    pub fn build(&self, max: u16, event_idx: bool, mem: &GuestMemory) -> Option<Queue> {
        if !self.size.is_power_of_two() || self.size > max {
            return None;
        }
        let mut queue = Queue::new(max).ok()?;
        let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        queue.set_size(self.size);
        let (low, high) = halves(self.desc);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(self.driver);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(self.device);
        queue.set_used_ring_address(low, high);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        // The setters refuse misaligned addresses silently.
        let taken = (queue.desc_table(), queue.avail_ring(), queue.used_ring())
            == (self.desc, self.driver, self.device);
        (taken && queue.is_valid(mem)).then_some(queue)
    }
}

/// The registers of all queues after a device reset. The device has returned the queues already.
pub fn reset_queues(sizes: &[u16], kicks: &[EventFd]) -> Vec<QueueRegisters> {
    for kick in kicks {
        // Empties the descriptor; an error means that it was empty.
        let _ = kick.read();
    }
    sizes
        .iter()
        .map(|&size| QueueRegisters::new(size))
        .collect()
}
