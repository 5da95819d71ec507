//! The host's side of the outputs: looked at, changed, watched, by any number of threads, whether or not a
//! guest drives them. It outlives the device: a machine's reset gives it another one.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    budget::Budget,
    cursor::{Cursor, CursorImage},
    frame_copy::{FrameCopy, MAX_COPIES},
    output::{Mode, OUTPUTS, Output, outputs},
    protocol::{VIRTIO_GPU_EVENT_DISPLAY, VIRTIO_GPU_F_EDID},
    resource::{Blob, BlobMemory, Kind, Resource, Resources},
    scanout::{Area, ExportedImage, Frame, FrameError, Location, Pixels, Scanout},
    watch::{Watch, Watches},
};
use crate::{
    dmabuf::Exporter,
    memory::{AddressSpace, MapWatcher},
    virtio::DeviceStatus,
};

/// What a display is made of.
#[derive(Clone, Debug)]
pub struct DisplayConfig {
    /// The outputs that are plugged in at first, at most [`OUTPUTS`].
    pub outputs: Vec<Mode>,
    /// What their EDIDs call them: printable ASCII, of which 13 characters count.
    pub name: String,
    /// Host memory that a guest can have for its resources, in bytes.
    pub max_resource_memory: u64,
}

/// Why the display does not do what it was asked.
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
    /// What the guest shows is not there for the moment.
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

/// What the device did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// RESOURCE_FLUSH commands.
    pub flushes: u64,
    /// Pixels that TRANSFER_TO_HOST_2D copied, in bytes.
    pub transferred_bytes: u64,
    /// Host memory that the guest's resources hold, in bytes.
    pub resource_memory: u64,
}

/// An output as seen from the host.
#[derive(Clone, Debug)]
pub struct OutputInfo {
    /// Its number.
    pub index: usize,
    /// Size and whether it is plugged in.
    pub output: Output,
    /// What of a resource the guest shows on it: its size in pixels is what the guest chose.
    pub shown: Option<Area>,
}

/// A resource in a dma-buf.
#[derive(Debug)]
pub struct ExportedResource {
    /// The dma-buf.
    pub fd: OwnedFd,
    /// Bytes.
    pub size: u64,
    /// Where the pixels live.
    pub location: Location,
    /// The identity that the guest knows it by, if it asked for one.
    pub uuid: Option<[u8; 16]>,
}

/// What the driver has asked since outputs changed. It clears the event after it has asked, so one that
/// came while it was asking would be lost.
#[derive(Debug, Default)]
pub(super) struct Heard {
    /// Display information is out of date.
    stale_info: bool,
    /// So is the EDID of these outputs.
    stale_edids: [bool; OUTPUTS],
    /// Whether it asked for anything since it was last told again.
    asked: bool,
}

impl Heard {
    fn change(&mut self, output: usize) {
        self.stale_info = true;
        self.stale_edids[output] = true;
    }

    pub(super) fn info(&mut self) {
        self.stale_info = false;
        self.asked = true;
    }

    pub(super) fn edid(&mut self, output: usize) {
        self.stale_edids[output] = false;
        self.asked = true;
    }
}

/// Everything behind one lock. Held for the time of a command, never while pixels are read or exported.
#[derive(Debug)]
pub(super) struct State {
    pub name: String,
    pub outputs: [Output; OUTPUTS],
    pub scanouts: [Option<Scanout>; OUTPUTS],
    pub cursors: [Cursor; OUTPUTS],
    pub resources: Resources,
    pub watches: Watches,
    pub statistics: Statistics,
    /// Features that the driver accepted.
    pub features: u64,
    /// `events_read` of the configuration.
    pub events: u32,
    /// What of the outputs the driver has heard.
    pub heard: Heard,
    /// The way to the driver, while there is one.
    pub status: Option<DeviceStatus>,
}

impl State {
    pub(super) fn set_scanout(&mut self, output: usize, scanout: Option<Scanout>) {
        if self.scanouts[output] != scanout {
            self.scanouts[output] = scanout;
            self.watches.scanout(output);
        }
    }

    /// The driver wrote `events_clear`. What it has not heard of stays, and it is told again; one that has
    /// not asked meanwhile does not care.
    pub(super) fn clear_events(&mut self, events: u32) {
        let edids = self.features & VIRTIO_GPU_F_EDID != 0;
        let stale = self.heard.stale_info || edids && self.heard.stale_edids.contains(&true);
        let again = events & VIRTIO_GPU_EVENT_DISPLAY != 0 && stale && self.heard.asked;
        self.heard.asked = false;
        self.events &= !events;
        if again {
            self.events |= VIRTIO_GPU_EVENT_DISPLAY;
            if let Some(status) = &self.status {
                status.config_changed();
            }
        }
    }

    /// Forgets what the driver did.
    pub(super) fn reset(&mut self) {
        self.resources.clear();
        for output in 0..OUTPUTS {
            self.set_scanout(output, None);
            if self.cursors[output].image.take().is_some() {
                self.watches.cursor_image(output);
            }
        }
        self.features = 0;
        self.events = 0;
        self.heard = Heard::default();
        self.status = None;
    }

    /// Whether an output shows memory of a passed-through device that is not there now.
    fn is_gone(&self, output: usize) -> bool {
        let scanout = self.scanouts.get(output).copied().flatten();
        let resource = scanout.and_then(|scanout| self.resources.get(scanout.resource).ok());
        resource.is_some_and(
            |resource| matches!(&resource.kind, Kind::Blob(blob) if blob.memory.is_gone()),
        )
    }

    fn frame(&self, output: usize) -> Option<Frame> {
        let scanout = self.scanouts.get(output).copied().flatten()?;
        let resource = self.resources.get(scanout.resource).ok()?;
        Some(Frame {
            layout: scanout.layout,
            area: scanout.area,
            location: location(resource),
            surface: resource.surface()?.clone(),
        })
    }
}

fn location(resource: &Resource) -> Location {
    match resource.kind {
        Kind::Image(_) | Kind::Host(_) => Location::Host,
        Kind::Blob(Blob {
            memory: BlobMemory::Device { .. },
            ..
        }) => Location::Device,
        Kind::Blob(_) => Location::GuestRam,
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    exporter: Arc<Exporter>,
    copies: Budget,
    /// Signalled when a watcher releases something or leaves.
    pub released: EventFd,
}

impl Shared {
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_device(&self) {
        if let Err(error) = self.released.write(1) {
            tracing::error!(%error, "cannot wake the GPU's thread");
        }
    }
}

impl MapWatcher for Shared {
    fn memory_changed(&self, map: &AddressSpace, gpa: u64, len: u64) {
        let state = &mut *self.lock();
        for id in state.resources.memory_changed(map, gpa, len) {
            state.memory_changed(id);
        }
    }
}

/// The host's side of the outputs.
#[derive(Clone, Debug)]
pub struct DisplayHandle(pub(super) Arc<Shared>);

impl DisplayHandle {
    /// A display that no guest drives yet.
    pub fn new(config: DisplayConfig, exporter: Arc<Exporter>) -> io::Result<Self> {
        let state = State {
            outputs: outputs(&config.outputs),
            name: config.name,
            scanouts: [None; OUTPUTS],
            cursors: Default::default(),
            resources: Resources::new(config.max_resource_memory),
            watches: Watches::default(),
            statistics: Statistics::default(),
            features: 0,
            events: 0,
            heard: Heard::default(),
            status: None,
        };
        Ok(Self(Arc::new(Shared {
            state: Mutex::new(state),
            exporter,
            copies: Budget::new(MAX_COPIES),
            released: EventFd::new(EFD_NONBLOCK)?,
        })))
    }

    /// All outputs, plugged in or not.
    pub fn outputs(&self) -> Vec<OutputInfo> {
        let state = self.0.lock();
        let outputs = state.outputs.iter().zip(&state.scanouts).enumerate();
        outputs
            .map(|(index, (&output, scanout))| OutputInfo {
                index,
                output,
                shown: scanout.map(|scanout| scanout.area),
            })
            .collect()
    }

    /// Plugs an output in with a size, resizes it, or pulls it. The guest is told, and does what it likes.
    pub fn set_output(&self, index: usize, mode: Option<Mode>) -> Result<(), DisplayError> {
        if let Some(mode) = mode.filter(|mode| !mode.is_valid()) {
            return Err(DisplayError::BadMode(mode));
        }
        let mut state = self.0.lock();
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
        state.heard.change(index);
        state.watches.outputs();
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
        Ok(self.0.lock().frame(output))
    }

    fn lit(&self, output: usize) -> Result<Frame, DisplayError> {
        self.frame(output)?.ok_or_else(|| {
            if self.0.lock().is_gone(output) {
                DisplayError::Gone(output)
            } else {
                DisplayError::Dark(output)
            }
        })
    }

    /// Has the display follow what happens to memory of passed-through devices in `map`.
    pub(super) fn follow(&self, map: &AddressSpace) {
        let shared: Weak<Shared> = Arc::downgrade(&self.0);
        map.watch(shared);
    }

    /// A copy of what an output shows, without its cursor.
    pub fn read_scanout(&self, output: usize) -> Result<Pixels, DisplayError> {
        Ok(self.lit(output)?.read()?)
    }

    /// A dma-buf with what an output shows.
    pub fn export_scanout(&self, output: usize) -> Result<ExportedImage, DisplayError> {
        Ok(self.export(&self.lit(output)?)?)
    }

    /// A dma-buf of a frame.
    pub fn export(&self, frame: &Frame) -> Result<ExportedImage, FrameError> {
        frame.export(&self.0.exporter)
    }

    /// A copy of a frame of which there is no dma-buf.
    pub fn copy(&self, frame: Frame) -> Result<FrameCopy, FrameError> {
        FrameCopy::new(frame, &self.0.copies)
    }

    /// A dma-buf of a resource's memory.
    pub fn export_resource(&self, id: u32) -> Result<ExportedResource, DisplayError> {
        let (surface, location, uuid) = {
            let state = self.0.lock();
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
        let state = self.0.lock();
        let cursor = state.cursors.get(output);
        cursor.cloned().ok_or(DisplayError::NoOutput(output))
    }

    /// What the device did so far.
    pub fn statistics(&self) -> Statistics {
        let state = self.0.lock();
        Statistics {
            resource_memory: state.resources.memory_used(),
            ..state.statistics
        }
    }

    /// Starts to watch, with everything as it is now as the first news. Who `paces` holds the guest's fenced
    /// flushes back, for a short time at most, until it releases them.
    pub fn subscribe(&self, paces: bool) -> io::Result<Subscription> {
        let watch = Arc::new(Watch::new(EventFd::new(EFD_NONBLOCK)?, paces));
        self.0.lock().watches.add(&watch);
        Ok(Subscription {
            watch,
            display: WakingHandle(self.clone()),
        })
    }
}

/// What happened on a display.
#[derive(Clone, Debug)]
pub enum DisplayEvent {
    /// Outputs were plugged in, pulled or resized: see [`DisplayHandle::outputs`].
    Outputs,
    /// An output shows another image, or the same in other memory, or none.
    Scanout {
        /// The output.
        output: usize,
        /// What it shows.
        frame: Option<Frame>,
        /// Whether it shows something that is not there for the moment: see [`DisplayError::Gone`].
        gone: bool,
    },
    /// The guest drew.
    Damage {
        /// The output.
        output: usize,
        /// Where, on the output.
        areas: Vec<Area>,
        /// To be given to [`Subscription::release`].
        serial: u64,
    },
    /// A cursor looks different.
    CursorImage {
        /// The output.
        output: usize,
        /// What it looks like; nothing while it is hidden.
        image: Option<Arc<CursorImage>>,
    },
    /// A cursor is elsewhere.
    CursorPosition {
        /// The output.
        output: usize,
        /// Where its image's upper left corner is, from the left.
        x: i32,
        /// The same from the top.
        y: i32,
    },
}

/// One watcher's view of a display. Dropping ends it.
#[derive(Debug)]
pub struct Subscription {
    /// Goes first.
    watch: Arc<Watch>,
    display: WakingHandle,
}

/// Wakes the device when dropped: nobody waits for a watcher that has gone.
#[derive(Debug)]
struct WakingHandle(DisplayHandle);

impl Drop for WakingHandle {
    fn drop(&mut self) {
        self.0.0.wake_device();
    }
}

impl Subscription {
    /// What happened since the last call, as it is now. Nothing that was overtaken is told.
    pub fn events(&self) -> Vec<DisplayEvent> {
        let news = self.watch.take();
        let mut events = Vec::new();
        if news.outputs {
            events.push(DisplayEvent::Outputs);
        }
        let state = self.display.0.0.lock();
        for (output, changes) in news.each.into_iter().enumerate() {
            if changes.scanout {
                let frame = state.frame(output);
                let gone = frame.is_none() && state.is_gone(output);
                events.push(DisplayEvent::Scanout {
                    output,
                    frame,
                    gone,
                });
            }
            if !changes.damage.is_empty() {
                events.push(DisplayEvent::Damage {
                    output,
                    areas: changes.damage,
                    serial: news.serial,
                });
            }
            let cursor = &state.cursors[output];
            if changes.cursor_image {
                let image = cursor.image.clone();
                events.push(DisplayEvent::CursorImage { output, image });
            }
            if changes.cursor_position {
                let (x, y) = (cursor.x, cursor.y);
                events.push(DisplayEvent::CursorPosition { output, x, y });
            }
        }
        events
    }

    /// Has the next [`Self::events`] tell once more what each output shows.
    pub fn repeat_scanouts(&self) {
        self.watch.repeat_scanouts();
    }

    /// The watcher is done with everything up to the damage of this serial.
    pub fn release(&self, serial: u64) {
        self.watch.release(serial);
        self.display.0.0.wake_device();
    }
}

impl AsFd for Subscription {
    /// Readable while there is news.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the event descriptor is open for as long as the borrow of the watch that owns it.
        unsafe { BorrowedFd::borrow_raw(self.watch.ready.as_raw_fd()) }
    }
}
