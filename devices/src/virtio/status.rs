//! The status of a device, which its threads share with its transport.

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
};

use crate::{hypervisor::MsiVector, sync::Mutex};

/// The device's link to its driver outside of queues.
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
    /// How often the driver broke the rules.
    errors: AtomicU64,
    on_error: OnErrorSlot,
}

/// Called when a driver breaks the device, on any thread; must not block.
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
    /// The status of a working device without a configuration vector.
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

    /// How often the driver broke the rules since the device was created.
    pub fn errors(&self) -> u64 {
        self.shared.errors.load(Ordering::Relaxed)
    }

    /// Sets the function to call when the device breaks. Only the first call has an effect.
    pub fn set_on_error(&self, on_error: OnError) {
        let _ = self.shared.on_error.0.set(on_error);
    }

    /// Whether the driver broke the rules since the last reset.
    pub fn needs_reset(&self) -> bool {
        self.shared.needs_reset.load(Ordering::Acquire)
    }

    /// Reports a change of device configuration: increments the generation and raises the configuration interrupt.
    pub fn config_changed(&self) {
        self.shared.generation.fetch_add(1, Ordering::AcqRel);
        self.signal_config();
    }

    /// The value of config_generation.
    pub fn generation(&self) -> u8 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// Sets the configuration vector (config_msix_vector).
    pub fn set_config_vector(&self, vector: Option<Arc<dyn MsiVector>>) {
        *self.shared.config_vector.lock() = vector;
    }

    /// Clears DEVICE_NEEDS_RESET (device reset).
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::{Hypervisor, test_util::FakeHypervisor};

    /// Virtio 1.3, 2.1.1: a driver that does not poll the status learns it by a configuration interrupt.
    #[test]
    fn a_broken_device_interrupts_its_driver() {
        let status = DeviceStatus::new();
        let vector = FakeHypervisor::default().msi_vector().unwrap();
        status.set_config_vector(Some(vector.clone()));
        status.set_needs_reset();
        assert!(status.needs_reset());
        assert_eq!(vector.event().read().unwrap(), 1);
    }
}
