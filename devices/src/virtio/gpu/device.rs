//! The GPU as a virtio device.

use std::sync::Arc;

use zerocopy::IntoBytes;

use super::{
    commands::BLOB_ALIGNMENT,
    display::DisplayHandle,
    output::OUTPUTS,
    protocol::*,
    queues::Queues,
    render::{Renderer, Rendering},
};
use crate::{
    memory::AddressSpace,
    virtio::{
        ActivateError, Activation, VirtioDevice, Worker, read_bytes, transport::SharedMemory,
    },
};

const QUEUE_SIZES: &[u16] = &[256, 16];
pub(super) const FEATURES: u64 = VIRTIO_GPU_F_EDID
    | VIRTIO_GPU_F_RESOURCE_UUID
    | VIRTIO_GPU_F_RESOURCE_BLOB
    | VIRTIO_GPU_F_BLOB_ALIGNMENT;

/// The GPU device.
#[derive(Debug)]
pub struct Gpu {
    display: DisplayHandle,
    map: Arc<AddressSpace>,
    rendering: Option<Rendering>,
    worker: Option<Worker>,
}

impl Gpu {
    /// A device that drives `display`; blobs are looked up in `map`.
    pub fn new(display: DisplayHandle, map: Arc<AddressSpace>) -> Self {
        display.follow(&map);
        Self {
            display,
            map,
            rendering: None,
            worker: None,
        }
    }

    /// The same with 3D.
    pub fn with_renderer(mut self, rendering: Rendering) -> Self {
        self.rendering = Some(rendering);
        self
    }
}

impl VirtioDevice for Gpu {
    fn device_id(&self) -> u32 {
        VIRTIO_GPU_DEVICE_ID
    }

    fn name(&self) -> &'static str {
        "gpu"
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        match self.rendering {
            Some(_) => FEATURES | VIRTIO_GPU_F_VIRGL | VIRTIO_GPU_F_CONTEXT_INIT,
            None => FEATURES,
        }
    }

    fn shared_memory(&self) -> Option<SharedMemory> {
        let memory = &self.rendering.as_ref()?.memory;
        memory
            .shared_memory()
            .inspect_err(|error| tracing::error!(%error, "the GPU shows no blobs"))
            .ok()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let rendering = self.rendering.as_ref();
        let capsets = rendering.map_or(0, |rendering| rendering.capsets.len());
        let config = Config {
            events_read: self.display.0.state.lock().events.into(),
            num_scanouts: (OUTPUTS as u32).into(),
            num_capsets: (capsets as u32).into(),
            blob_alignment: BLOB_ALIGNMENT.into(),
            ..Default::default()
        };
        read_bytes(config.as_bytes(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        const EVENTS_CLEAR: u64 = std::mem::offset_of!(Config, events_clear) as u64;
        if let (EVENTS_CLEAR, &[a, b, c, d]) = (offset, data) {
            let events = u32::from_le_bytes([a, b, c, d]);
            self.display.0.state.lock().clear_events(events);
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        // A driver that does not negotiate 3D gets no renderer.
        let wanted = activation.features & VIRTIO_GPU_F_VIRGL != 0;
        let rendering = self.rendering.as_ref().filter(|_| wanted);
        let renderer = rendering.map(Renderer::start).transpose();
        let renderer = renderer.map_err(|source| ActivateError::Host {
            device: "gpu",
            action: "start a renderer".into(),
            source,
        })?;
        let queues = Queues::new(&mut activation, &self.display, &self.map, renderer)?;
        let mut state = self.display.0.state.lock();
        state.features = activation.features;
        state.status = Some(activation.status.clone());
        drop(state);
        self.worker = Some(Worker::spawn("gpu", activation.status, queues)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
        self.display.0.state.lock().reset();
        if let Some(rendering) = &self.rendering {
            rendering.memory.clear();
        }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.reset();
    }
}
