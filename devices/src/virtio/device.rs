//! A virtio device as its transport sees it, and what it gets at DRIVER_OK.

use std::fmt;

use super::{
    active_queue::ActiveQueue, error::ActivateError, queue::DeviceQueue, status::DeviceStatus,
    transport::SharedMemory,
};
use crate::GuestMemory;

/// Virtio device as its transport sees it (Virtio 1.3, chapter 2).
///
/// Calls come from one thread at a time, some of them from vCPU threads: none may block on host input or output.
/// Queues are served by threads of the device, which [`activate`](VirtioDevice::activate) starts and
/// [`reset`](VirtioDevice::reset) joins.
pub trait VirtioDevice: Send + fmt::Debug {
    /// Virtio device id (Virtio 1.3, chapter 5).
    fn device_id(&self) -> u32;

    /// Name for logs: "block", "net".
    fn name(&self) -> &'static str;

    /// The largest size of each queue: a power of two, at most 32768. The length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Device-specific features offered (bits 0–23 and 50+). The transport adds VERSION_1,
    /// RING_INDIRECT_DESC, RING_EVENT_IDX.
    fn features(&self) -> u64;

    /// Reads device configuration. Bytes beyond the structure are left as they are (zero).
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes device configuration. Writes to read-only fields are ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Memory that the device shares with its driver, for the life of the device.
    fn shared_memory(&self) -> Option<SharedMemory> {
        None
    }

    /// DRIVER_OK: the queues are live. A queue that the driver did not enable is `None`.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// The state before activation: threads joined, queues dropped. Idempotent; must not fail.
    fn reset(&mut self);
}

/// What a device gets at DRIVER_OK.
#[derive(Debug)]
pub struct Activation {
    /// Guest RAM.
    pub mem: GuestMemory,
    /// The negotiated features, transport bits included.
    pub features: u64,
    /// One entry for each queue of [`VirtioDevice::queue_sizes`].
    pub queues: Vec<Option<ActiveQueue>>,
    /// Signals configuration changes to the driver, and a broken device to the transport.
    pub status: DeviceStatus,
}

impl Activation {
    /// Takes a queue that the device cannot work without.
    pub fn take_queue(&mut self, index: u16) -> Result<DeviceQueue, ActivateError> {
        self.take_optional_queue(index)
            .ok_or(ActivateError::QueueNotReady(index))
    }

    /// Takes a queue that the driver need not enable.
    pub fn take_optional_queue(&mut self, index: u16) -> Option<DeviceQueue> {
        let active = self.queues.get_mut(usize::from(index))?.take()?;
        Some(DeviceQueue::new(active, self.mem.clone()))
    }
}

/// Reads `data.len()` bytes at `offset` of a configuration structure. Bytes beyond it are left as they are.
pub fn read_bytes(structure: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset)
        .ok()
        .and_then(|at| structure.get(at..));
    for (to, from) in data.iter_mut().zip(from.unwrap_or_default()) {
        *to = *from;
    }
}
