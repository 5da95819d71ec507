//! Registers of a function, as the driver sets them.

use std::sync::Arc;

use super::{
    layout::{STATUS_FEATURES_OK, VIRTIO_MSI_NO_VECTOR},
    queues::QueueRegisters,
};
use crate::{
    hypervisor::MsiVector,
    pci::{Bars, ConfigSpace, Msix},
    virtio::VirtioDevice,
};

/// State that the driver's accesses change.
pub struct State {
    pub config: ConfigSpace,
    pub bars: Bars,
    pub msix: Msix,
    pub msix_at: usize,
    pub pci_cfg_at: usize,
    pub device: Box<dyn VirtioDevice>,
    pub status: u8,
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub driver_features: u64,
    pub config_vector: u16,
    pub queue_select: u16,
    pub queues: Vec<QueueRegisters>,
    /// Whether the device has its queues.
    pub active: bool,
}

impl State {
    /// The vector number to read back, and the vector, for a number that the driver wrote.
    pub fn vector(&self, index: u16) -> (u16, Option<Arc<dyn MsiVector>>) {
        match self.msix.vector(index) {
            Some(vector) => (index, Some(vector)),
            None => (VIRTIO_MSI_NO_VECTOR, None),
        }
    }

    /// Features are fixed once the driver has set FEATURES_OK.
    pub fn set_driver_features(&mut self, value: u32) {
        if self.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    /// Changes the registers of the selected queue, unless the device has the queues.
    pub fn with_queue(&mut self, change: impl FnOnce(&mut QueueRegisters)) {
        if self.active {
            return;
        }
        if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) {
            change(queue);
        }
    }

    pub fn set_address(&mut self, offset: u64, keep: u64, value: u64) {
        self.with_queue(|queue| {
            let field = match offset {
                0x20..0x28 => &mut queue.desc,
                0x28..0x30 => &mut queue.driver,
                _ => &mut queue.device,
            };
            *field = *field & keep | value;
        });
    }
}
