//! The host side of the outputs: read, changed and followed by any number of threads, whether or not a guest drives
//! them. It outlives the device: a reset of the machine makes another device for it.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Weak, atomic::Ordering},
};

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    cursor::Cursor,
    frame::{ExportedFrame, Frame, FrameError},
    frame_copy::{FrameCopy, MAX_COPIES},
    geometry::Area,
    output::{Mode, OUTPUTS, Output},
    pixels::Pixels,
    protocol::VIRTIO_GPU_EVENT_DISPLAY,
    scanout::Location,
    state::{SharedState, Statistics, location},
};
use crate::{
    dmabuf::Exporter,
    memory::{AddressSpace, MapWatcher, Quota},
};

/// Configuration of a display.
#[derive(Clone, Debug)]
pub struct DisplayConfig {
    /// The outputs that are plugged in at first, at most [`OUTPUTS`].
    pub outputs: Vec<Mode>,
    /// What their EDIDs call them: printable ASCII, of which 13 characters count.
    pub name: String,
    /// Host memory that a guest can have for its resources, in bytes.
    pub max_resource_memory: u64,
}

/// Why the display refuses a request.
#[derive(Debug, Error)]
pub enum DisplayError {
    /// There is no such output.
    #[error("there is no output {0}: they count from 0 to {last}", last = OUTPUTS - 1)]
    NoOutput(usize),
    /// No output can be of this size.
    #[error(
        "{width}x{height} is no size of an output: both must be from {min} to {max}",
        width = .0.width,
        height = .0.height,
        min = Mode::MIN,
        max = Mode::MAX
    )]
    BadMode(Mode),
    /// The guest shows nothing there.
    #[error("the guest shows nothing on output {0}")]
    Dark(usize),
    /// What the guest shows is off for the moment.
    #[error(
        "what output {0} shows is memory of a passed-through device that is off: the guest resets the device, has \
         it asleep, or has switched its memory off"
    )]
    Gone(usize),
    /// The guest has no such resource, or it has no memory now.
    #[error("the guest has no resource {0} with memory")]
    NoResource(u32),
    /// The pixels cannot be had.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// An output as seen from the host.
#[derive(Clone, Debug)]
pub struct OutputInfo {
    /// Its number.
    pub index: usize,
    /// Size and whether it is plugged in.
    pub output: Output,
    /// The part of a resource that the guest shows on it, in pixels.
    pub shown: Option<Area>,
}

/// A resource as a dma-buf.
#[derive(Debug)]
pub struct ExportedResource {
    /// The dma-buf.
    pub fd: OwnedFd,
    /// Bytes.
    pub size: u64,
    /// Where the pixels live.
    pub location: Location,
    /// The UUID that the guest asked for, if it did.
    pub uuid: Option<[u8; 16]>,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub state: SharedState,
    exporter: Arc<Exporter>,
    copies: Arc<Quota>,
    /// Signalled when a subscriber releases a flush or is dropped.
    pub released: EventFd,
}

impl Shared {
    pub fn wake_device(&self) {
        if let Err(error) = self.released.write(1) {
            tracing::error!(%error, "cannot wake the GPU's thread");
        }
    }
}

impl MapWatcher for Shared {
    fn memory_changed(&self, map: &AddressSpace, gpa: u64, len: u64) {
        let state = &mut *self.state.lock();
        for id in state.resources.memory_changed(map, gpa, len) {
            state.memory_changed(id);
        }
    }
}

/// The host side of the outputs.
#[derive(Clone, Debug)]
pub struct DisplayHandle(pub(super) Arc<Shared>);

impl DisplayHandle {
    /// A display that no guest drives yet.
    pub fn new(config: DisplayConfig, exporter: Arc<Exporter>) -> io::Result<Self> {
        let DisplayConfig {
            outputs,
            name,
            max_resource_memory,
        } = config;
        Ok(Self(Arc::new(Shared {
            state: SharedState::new(name, &outputs, max_resource_memory),
            exporter,
            copies: Quota::new(MAX_COPIES),
            released: EventFd::new(EFD_NONBLOCK)?,
        })))
    }

    /// All outputs, plugged in or not.
    pub fn outputs(&self) -> Vec<OutputInfo> {
        let state = self.0.state.lock();
        let outputs = state.outputs.iter().zip(&state.scanouts).enumerate();
        outputs
            .map(|(index, (&output, scanout))| OutputInfo {
                index,
                output,
                shown: scanout.map(|scanout| scanout.area),
            })
            .collect()
    }

    /// Connects an output with a size, resizes or disconnects it. The guest is notified, and decides itself.
    pub fn set_output(&self, index: usize, mode: Option<Mode>) -> Result<(), DisplayError> {
        if let Some(mode) = mode.filter(|mode| !mode.is_valid()) {
            return Err(DisplayError::BadMode(mode));
        }
        let mut state = self.0.state.lock();
        let output = state
            .outputs
            .get_mut(index)
            .ok_or(DisplayError::NoOutput(index))?;
        let wanted = Output {
            mode: mode.unwrap_or(output.mode),
            connected: mode.is_some(),
        };
        if *output == wanted {
            return Ok(());
        }
        *output = wanted;
        state.events |= VIRTIO_GPU_EVENT_DISPLAY;
        state.stale_info.output_changed(index);
        state.subscribers.outputs();
        if let Some(status) = &state.status {
            status.config_changed();
        }
        Ok(())
    }

    /// What an output shows; `None` while the guest shows nothing or has taken the memory away.
    pub fn frame(&self, output: usize) -> Result<Option<Frame>, DisplayError> {
        if output >= OUTPUTS {
            return Err(DisplayError::NoOutput(output));
        }
        Ok(self.0.state.lock().frame(output))
    }

    fn lit(&self, output: usize) -> Result<Frame, DisplayError> {
        self.frame(output)?.ok_or_else(|| {
            if self.0.state.lock().is_gone(output) {
                DisplayError::Gone(output)
            } else {
                DisplayError::Dark(output)
            }
        })
    }

    /// Lets the display follow memory of passed-through devices in `map`.
    pub(super) fn follow(&self, map: &AddressSpace) {
        let shared: Weak<Shared> = Arc::downgrade(&self.0);
        map.watch(shared);
    }

    /// A copy of what an output shows, without its cursor.
    pub fn read_scanout(&self, output: usize) -> Result<Pixels, DisplayError> {
        Ok(self.lit(output)?.read()?)
    }

    /// A dma-buf of what an output shows.
    pub fn export_scanout(&self, output: usize) -> Result<ExportedFrame, DisplayError> {
        Ok(self.export(&self.lit(output)?)?)
    }

    /// A dma-buf of a frame.
    pub fn export(&self, frame: &Frame) -> Result<ExportedFrame, FrameError> {
        frame.export(&self.0.exporter)
    }

    /// A copy of a frame, for viewers that can use no dma-buf of it.
    pub fn copy(&self, frame: Frame) -> Result<FrameCopy, FrameError> {
        FrameCopy::new(frame, &self.0.copies)
    }

    /// A dma-buf of a resource's memory.
    pub fn export_resource(&self, id: u32) -> Result<ExportedResource, DisplayError> {
        let (surface, location, uuid) = {
            let state = self.0.state.lock();
            let found = state.resources.get(id).ok();
            found
                .and_then(|found| Some((found.surface()?.clone(), location(found), found.uuid)))
                .ok_or(DisplayError::NoResource(id))?
        };
        let dmabuf = surface.buffer.dmabuf(&self.0.exporter);
        let dmabuf = dmabuf.map_err(FrameError::from)?;
        Ok(ExportedResource {
            fd: dmabuf.try_clone().map_err(FrameError::Duplicate)?,
            size: surface.buffer.size(),
            location,
            uuid,
        })
    }

    /// An output's cursor.
    pub fn cursor(&self, output: usize) -> Result<Cursor, DisplayError> {
        let state = self.0.state.lock();
        let cursor = state.cursors.get(output);
        cursor.cloned().ok_or(DisplayError::NoOutput(output))
    }

    /// Statistics of the device so far.
    pub fn statistics(&self) -> Statistics {
        let state = self.0.state.lock();
        Statistics {
            copied_bytes: state.copied.load(Ordering::Relaxed),
            resource_memory: state.resources.memory_used(),
            ..state.statistics
        }
    }
}
