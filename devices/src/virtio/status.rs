//! The status of a device, which its threads and its transport share.

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
};

use crate::{hypervisor::MsiVector, sync::Mutex};

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
    config_vector: Mutex<Option<Arc<dyn MsiVector>>>,
    /// Bumped with each change of device configuration (Virtio 1.3, 4.1.4.3: config_generation).
    generation: AtomicU8,
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
