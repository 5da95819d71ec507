//! DRIVER_OK gives the queues to the device; a reset takes them back.

use super::{
    function::VirtioPciFunction,
    layout::{STATUS_FEATURES_OK, VIRTIO_F_EVENT_IDX, VIRTIO_MSI_NO_VECTOR},
    queues::reset_queues,
    state::State,
};
use crate::virtio::{ActivateError, Activation, ActiveQueue};

impl VirtioPciFunction {
    /// Hands the queues to the device (Virtio 1.3, 3.1.1, step 8).
    pub(super) fn activate(&self, state: &mut State) -> Result<(), ActivateError> {
        let negotiated = state.status & STATUS_FEATURES_OK != 0;
        let maxima: Vec<u16> = state.device.queue_sizes().into();
        let mut queues = Vec::with_capacity(maxima.len());
        for (index, registers) in state.queues.iter().enumerate() {
            if !registers.enabled {
                queues.push(None);
                continue;
            }
            let index = index as u16;
            let not_ready = ActivateError::QueueNotReady(index);
            let max = maxima.get(usize::from(index)).copied().unwrap_or(0);
            let event_idx = state.driver_features & VIRTIO_F_EVENT_IDX != 0;
            let queue = match registers.build(max, event_idx, &self.mem) {
                Some(queue) if negotiated => queue,
                _ => return Err(not_ready),
            };
            let kick = self.kicks[usize::from(index)]
                .try_clone()
                .map_err(|source| ActivateError::Host {
                    device: self.name,
                    action: "duplicate a descriptor".into(),
                    source,
                })?;
            queues.push(Some(ActiveQueue {
                index,
                queue,
                kick,
                vector: state.msix.vector(registers.vector),
                counters: self.counters[usize::from(index)].clone(),
            }));
        }
        state.device.activate(Activation {
            mem: self.mem.clone(),
            features: state.driver_features,
            queues,
            status: self.device_status.clone(),
        })?;
        state.active = true;
        // Kicks from before the device listened must not be lost.
        for kick in &self.kicks {
            let _ = kick.write(1);
        }
        Ok(())
    }

    /// Device reset (Virtio 1.3, 2.4.1): the device returns its queues, and every register gets its initial value.
    pub(super) fn reset_device(&self, state: &mut State) {
        state.device.reset();
        state.active = false;
        state.status = 0;
        state.device_feature_select = 0;
        state.driver_feature_select = 0;
        state.driver_features = 0;
        state.config_vector = VIRTIO_MSI_NO_VECTOR;
        state.queue_select = 0;
        state.queues = reset_queues(state.device.queue_sizes(), &self.kicks);
        self.device_status.set_config_vector(None);
        self.device_status.clear();
    }
}
