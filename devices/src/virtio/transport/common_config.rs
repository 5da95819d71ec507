//! Common configuration (Virtio 1.3, 4.1.4.3): features, status and queue registers.

use super::{function::VirtioPciFunction, layout::*, state::State};

impl VirtioPciFunction {
    /// Reads common configuration (Virtio 1.3, 4.1.4.3).
    pub(super) fn read_common(&self, state: &State, offset: u64, data: &mut [u8]) {
        let offered = state.device.features() | TRANSPORT_FEATURES;
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let queue = state.queues.get(usize::from(state.queue_select));
        let broken = if self.device_status.needs_reset() {
            STATUS_DEVICE_NEEDS_RESET
        } else {
            0
        };
        let mut image = Vec::with_capacity(COMMON_LEN as usize);
        image.extend(state.device_feature_select.to_le_bytes());
        image.extend(half(offered, state.device_feature_select).to_le_bytes());
        image.extend(state.driver_feature_select.to_le_bytes());
        image.extend(half(state.driver_features, state.driver_feature_select).to_le_bytes());
        image.extend(state.config_vector.to_le_bytes());
        image.extend((state.queues.len() as u16).to_le_bytes());
        image.push(state.status | broken);
        image.push(self.device_status.generation());
        image.extend(state.queue_select.to_le_bytes());
        image.extend(queue.map_or(0, |q| q.size).to_le_bytes());
        image.extend(queue.map_or(0, |q| q.vector).to_le_bytes());
        image.extend(u16::from(queue.is_some_and(|q| q.enabled)).to_le_bytes());
        image.extend(queue.map_or(0, |_| state.queue_select).to_le_bytes());
        for address in [
            queue.map_or(0, |q| q.desc),
            queue.map_or(0, |q| q.driver),
            queue.map_or(0, |q| q.device),
        ] {
            image.extend(address.to_le_bytes());
        }
        let bytes = (offset as usize..).zip(data.iter_mut());
        for (at, byte) in bytes {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    pub(super) fn write_common(&self, state: &mut State, offset: u64, data: &[u8]) {
        // Fields of 64 bits may be written in halves; all others only whole.
        match (offset, data) {
            (0x00, &[a, b, c, d]) => state.device_feature_select = u32::from_le_bytes([a, b, c, d]),
            (0x08, &[a, b, c, d]) => state.driver_feature_select = u32::from_le_bytes([a, b, c, d]),
            (0x0c, &[a, b, c, d]) => state.set_driver_features(u32::from_le_bytes([a, b, c, d])),
            (0x10, &[a, b]) => {
                let (index, vector) = state.vector(u16::from_le_bytes([a, b]));
                state.config_vector = index;
                self.device_status.set_config_vector(vector);
            }
            (0x14, &[status]) => self.set_status(state, status),
            (0x16, &[a, b]) => state.queue_select = u16::from_le_bytes([a, b]),
            (0x18, &[a, b]) => state.with_queue(|queue| queue.size = u16::from_le_bytes([a, b])),
            (0x1a, &[a, b]) => {
                let (index, _) = state.vector(u16::from_le_bytes([a, b]));
                state.with_queue(|queue| queue.vector = index);
            }
            (0x1c, &[1, 0]) => state.with_queue(|queue| queue.enabled = true),
            (0x20..0x38, &[a, b, c, d]) if offset.is_multiple_of(4) => {
                let value = u64::from(u32::from_le_bytes([a, b, c, d]));
                let shift = (offset % 8) * 8;
                state.set_address(offset, !(0xffff_ffff << shift), value << shift);
            }
            (0x20..0x38, &[a, b, c, d, e, f, g, h]) if offset.is_multiple_of(8) => {
                state.set_address(offset, 0, u64::from_le_bytes([a, b, c, d, e, f, g, h]));
            }
            _ => {}
        }
    }

    /// Handles a write of device_status (Virtio 1.3, 3.1.1).
    fn set_status(&self, state: &mut State, status: u8) {
        if status == 0 {
            return self.reset_device(state);
        }
        let added = status & !state.status;
        // The driver can only add bits, and cannot set the device's own bit.
        state.status |= status & !STATUS_DEVICE_NEEDS_RESET;
        if added & STATUS_FEATURES_OK != 0 {
            let offered = state.device.features() | TRANSPORT_FEATURES;
            let features = state.driver_features;
            if features & !offered != 0 || features & VIRTIO_F_VERSION_1 == 0 {
                tracing::info!(
                    device = self.name,
                    features = format_args!("{features:#x}"),
                    "refused the driver's features"
                );
                state.status &= !STATUS_FEATURES_OK;
            }
        }
        if added & STATUS_DRIVER_OK != 0
            && !state.active
            && let Err(error) = self.activate(state)
        {
            tracing::warn!(
                device = self.name,
                error = %crate::error_line(&error),
                "the device does not start"
            );
            self.device_status.set_needs_reset();
        }
    }
}
