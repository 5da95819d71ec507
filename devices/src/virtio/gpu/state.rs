//! State of the device and of its outputs, behind one lock.

use std::sync::{Arc, MutexGuard, atomic::AtomicU64};

use super::{
    cursor::Cursor,
    frame::Frame,
    output::Mode,
    output::{OUTPUTS, Output, outputs},
    protocol::{VIRTIO_GPU_EVENT_DISPLAY, VIRTIO_GPU_F_EDID},
    resource::{Blob, BlobMemory, Resource, ResourceKind, Resources},
    scanout::{Location, Scanout},
    subscriber::Subscribers,
};
use crate::{sync::Mutex, virtio::DeviceStatus};

/// Counters of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// RESOURCE_FLUSH commands.
    pub flushes: u64,
    /// Bytes of pixels that were copied: by TRANSFER_TO_HOST_2D, from textures that outputs cannot show, and from
    /// frames for pictures and for subscribers without dma-bufs.
    pub copied_bytes: u64,
    /// Host memory that resources of the guest hold, in bytes.
    pub resource_memory: u64,
}

/// Which display information the driver has not read since it changed. The driver clears the event after it has
/// read, so a change in between would be lost.
#[derive(Debug, Default)]
pub struct StaleDisplayInfo {
    /// Display information is out of date.
    display_info: bool,
    /// The EDIDs of these outputs are out of date.
    edids: [bool; OUTPUTS],
    /// Whether the driver read any of it since the last event.
    read: bool,
}

impl StaleDisplayInfo {
    pub fn output_changed(&mut self, output: usize) {
        self.display_info = true;
        self.edids[output] = true;
    }

    pub fn display_info_read(&mut self) {
        self.display_info = false;
        self.read = true;
    }

    pub fn edid_read(&mut self, output: usize) {
        self.edids[output] = false;
        self.read = true;
    }
}

/// The lock. Held for the time of a command, never while pixels are read or exported.
#[derive(Debug)]
pub struct SharedState(Mutex<State>);

impl SharedState {
    /// A display that no guest drives yet.
    pub fn new(name: String, modes: &[Mode], max_resource_memory: u64) -> Self {
        Self(Mutex::new(State {
            outputs: outputs(modes),
            name,
            scanouts: [None; OUTPUTS],
            cursors: Default::default(),
            resources: Resources::new(max_resource_memory),
            subscribers: Subscribers::default(),
            statistics: Statistics::default(),
            copied: Arc::default(),
            features: 0,
            events: 0,
            stale_info: StaleDisplayInfo::default(),
            status: None,
        }))
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock()
    }
}

/// Everything behind one lock. Held for the time of a command, never while pixels are read or exported.
#[derive(Debug)]
pub struct State {
    pub name: String,
    pub outputs: [Output; OUTPUTS],
    pub scanouts: [Option<Scanout>; OUTPUTS],
    pub cursors: [Cursor; OUTPUTS],
    pub resources: Resources,
    pub subscribers: Subscribers,
    pub statistics: Statistics,
    /// See [`Statistics::copied_bytes`]. Frames count too, without the lock.
    pub copied: Arc<AtomicU64>,
    /// Features that the driver accepted.
    pub features: u64,
    /// `events_read` of the configuration.
    pub events: u32,
    /// Display information that the driver has not read.
    pub stale_info: StaleDisplayInfo,
    /// Signals the driver, while there is one.
    pub status: Option<DeviceStatus>,
}

impl State {
    pub fn set_scanout(&mut self, output: usize, scanout: Option<Scanout>) {
        if self.scanouts[output] != scanout {
            self.scanouts[output] = scanout;
            self.subscribers.scanout(output);
        }
    }

    /// The driver wrote `events_clear`. Unread information is signalled again, unless the driver has read nothing
    /// since the last event.
    pub fn clear_events(&mut self, events: u32) {
        let edids = self.features & VIRTIO_GPU_F_EDID != 0;
        let stale = self.stale_info.display_info || edids && self.stale_info.edids.contains(&true);
        let again = events & VIRTIO_GPU_EVENT_DISPLAY != 0 && stale && self.stale_info.read;
        self.stale_info.read = false;
        self.events &= !events;
        if again {
            self.events |= VIRTIO_GPU_EVENT_DISPLAY;
            if let Some(status) = &self.status {
                status.config_changed();
            }
        }
    }

    /// Device reset: everything that the driver set.
    pub fn reset(&mut self) {
        self.resources.clear();
        for output in 0..OUTPUTS {
            self.set_scanout(output, None);
            if self.cursors[output].image.take().is_some() {
                self.subscribers.cursor_image(output);
            }
        }
        self.features = 0;
        self.events = 0;
        self.stale_info = StaleDisplayInfo::default();
        self.status = None;
    }

    /// Whether an output shows memory of a passed-through device that is off now.
    pub fn is_gone(&self, output: usize) -> bool {
        let scanout = self.scanouts.get(output).copied().flatten();
        let resource = scanout.and_then(|scanout| self.resources.get(scanout.resource).ok());
        resource.is_some_and(
            |resource| matches!(&resource.kind, ResourceKind::Blob(blob) if blob.memory.is_gone()),
        )
    }

    pub fn frame(&self, output: usize) -> Option<Frame> {
        let scanout = self.scanouts.get(output).copied().flatten()?;
        let resource = self.resources.get(scanout.resource).ok()?;
        Some(Frame {
            layout: scanout.layout,
            area: scanout.area,
            location: location(resource),
            surface: resource.surface()?.clone(),
            copied: self.copied.clone(),
        })
    }
}

pub fn location(resource: &Resource) -> Location {
    match resource.kind {
        ResourceKind::Image(_) | ResourceKind::Host(_) => Location::Host,
        ResourceKind::Blob(Blob {
            memory: BlobMemory::Device { .. },
            ..
        }) => Location::Device,
        ResourceKind::Blob(_) => Location::GuestRam,
    }
}
