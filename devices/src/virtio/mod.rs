//! Virtio 1.x devices and their PCI transport. One file a device.
//!
//! A device implements [`VirtioDevice`]. The transport ([`transport`]) owns the registers, the feature
//! negotiation and the queues' configuration; it hands the queues over at DRIVER_OK and takes the
//! device back to its initial state by [`VirtioDevice::reset`].

pub mod block;
pub mod console;
pub mod gpu;
pub mod input;
pub mod net;
pub mod queue;
pub mod rng;
pub mod transport;
mod vhost;
pub mod vsock;

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use vmm_sys_util::eventfd::EventFd;

use crate::{GuestMemory, hypervisor::MsiVector};

/// Why a device could not take its queues over at DRIVER_OK.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver left a queue that the device cannot work without disabled, or set it up wrongly.
    #[error("the guest's driver did not set up queue {0}")]
    QueueNotReady(u16),
    /// The host refused something.
    #[error("cannot start the {device} device: {action}")]
    Host {
        /// The device's name.
        device: &'static str,
        /// What was tried.
        action: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}

/// Virtio device as its transport sees it (Virtio 1.3, chapter 2).
///
/// All calls come from one thread at a time, some of them from vCPU threads: none may block on
/// host input or output. Work on queues happens on threads of the device's own, started by
/// [`activate`](VirtioDevice::activate) and joined by [`reset`](VirtioDevice::reset).
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

    /// Memory that the device shares with its driver, for as long as the device is there.
    fn shared_memory(&self) -> Option<transport::SharedMemory> {
        None
    }

    /// DRIVER_OK: the queues are live. A queue that the driver did not enable is `None`.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Back to the state before activation: threads joined, queues dropped. Idempotent; must not fail.
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
    /// Tells the driver of configuration changes and the transport of a broken device.
    pub status: DeviceStatus,
}

impl Activation {
    /// Takes a queue that the device cannot work without.
    pub fn take_queue(&mut self, index: u16) -> Result<queue::DeviceQueue, ActivateError> {
        self.take_optional_queue(index)
            .ok_or(ActivateError::QueueNotReady(index))
    }

    /// Takes a queue that the driver need not enable.
    pub fn take_optional_queue(&mut self, index: u16) -> Option<queue::DeviceQueue> {
        let active = self.queues.get_mut(usize::from(index))?.take()?;
        Some(queue::DeviceQueue::new(active, self.mem.clone()))
    }
}

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
    /// Counts what passes.
    pub counters: Arc<queue::QueueCounters>,
}

/// Reads `data.len()` bytes at `offset` of a device's configuration structure; what lies beyond it stays
/// as it is.
fn read_bytes(structure: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset)
        .ok()
        .and_then(|at| structure.get(at..));
    for (to, from) in data.iter_mut().zip(from.unwrap_or_default()) {
        *to = *from;
    }
}

/// The device's way to speak to its driver outside of a queue.
#[derive(Clone, Debug)]
pub struct DeviceStatus {
    shared: Arc<SharedStatus>,
}

/// Bits that transport and device threads share.
#[derive(Debug, Default)]
struct SharedStatus {
    /// DEVICE_NEEDS_RESET (Virtio 1.3, 2.1).
    needs_reset: AtomicBool,
    /// The configuration vector, as the driver last set it.
    config_vector: crate::sync::Mutex<Option<Arc<dyn MsiVector>>>,
    /// Bumped with each change of device configuration (Virtio 1.3, 4.1.4.3: config_generation).
    generation: std::sync::atomic::AtomicU8,
    /// How often the device was broken.
    errors: AtomicU64,
    on_error: OnErrorSlot,
}

/// Told when a device breaks, on whatever thread; must not block.
pub type OnError = Box<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct OnErrorSlot(OnceLock<OnError>);

impl fmt::Debug for OnErrorSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnError")
    }
}

impl Default for DeviceStatus {
    fn default() -> Self {
        Self::new()
    }
}

impl DeviceStatus {
    /// A device without problems and without a configuration vector.
    pub fn new() -> Self {
        Self {
            shared: Arc::default(),
        }
    }

    /// Marks the device broken: the driver broke the rules. Sets DEVICE_NEEDS_RESET and tells the driver.
    pub fn set_needs_reset(&self) {
        self.shared.errors.fetch_add(1, Ordering::Relaxed);
        self.shared.needs_reset.store(true, Ordering::Release);
        self.signal_config();
        if let Some(on_error) = self.shared.on_error.0.get() {
            on_error();
        }
    }

    /// How often the device was broken since it was made.
    pub fn errors(&self) -> u64 {
        self.shared.errors.load(Ordering::Relaxed)
    }

    /// Has `on_error` called when the device breaks. The first one stays.
    pub fn set_on_error(&self, on_error: OnError) {
        let _ = self.shared.on_error.0.set(on_error);
    }

    /// Whether the device is broken since its last reset.
    pub fn needs_reset(&self) -> bool {
        self.shared.needs_reset.load(Ordering::Acquire)
    }

    /// Device configuration changed: bumps the generation and raises the configuration interrupt.
    pub fn config_changed(&self) {
        self.shared.generation.fetch_add(1, Ordering::AcqRel);
        self.signal_config();
    }

    /// The value of config_generation.
    pub fn generation(&self) -> u8 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// The transport's setting of config_msix_vector.
    pub fn set_config_vector(&self, vector: Option<Arc<dyn MsiVector>>) {
        *self.shared.config_vector.lock() = vector;
    }

    /// Forgets a broken state (device reset).
    pub fn clear(&self) {
        self.shared.needs_reset.store(false, Ordering::Release);
    }

    fn signal_config(&self) {
        let vector = self.shared.config_vector.lock().clone();
        if let Some(vector) = vector
            && let Err(error) = vector.event().write(1)
        {
            tracing::error!(%error, "cannot raise a configuration interrupt");
        }
    }
}

#[cfg(any(test, feature = "test-util"))]
pub mod test_util;
