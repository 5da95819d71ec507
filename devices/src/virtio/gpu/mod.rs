//! GPU device (Virtio 1.4, 5.7): 2D, with blobs of guest memory that leave as dma-bufs.
//!
//! `protocol` is the wire, `commands` what each command does, `resources` what the driver has us remember,
//! [`Frame`] the way out, [`DisplayHandle`] the host's side. There is no VIRGL: Linux imports other devices'
//! dma-bufs only into a device without it.
//!
//! One thread serves both queues; it and the host's side share one state behind a lock that is held for the
//! time of a command.

mod blob_memory;
mod budget;
mod commands;
mod copy;
mod cursor;
mod display;
mod edid;
mod format;
mod output;
mod protocol;
mod resources;
mod scanout;
#[cfg(any(test, feature = "test-util"))]
pub mod stream_check;
mod transfer;
mod watch;

use std::{
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use zerocopy::IntoBytes;

pub use commands::BLOB_ALIGNMENT;
pub use copy::{FrameCopy, MAX_COPIES};
pub use cursor::{Cursor, CursorImage, SIZE as CURSOR_SIZE};
pub use display::{
    DisplayConfig, DisplayError, DisplayEvent, DisplayHandle, ExportedResource, OutputInfo,
    Statistics, Subscription,
};
pub use edid::{NAME_MAX, edid};
pub use format::{DRM_FORMAT_MOD_LINEAR, FORMATS, Format};
pub use output::{Mode, OUTPUTS, Output};
pub use scanout::{Area, ExportedImage, Frame, FrameError, ImageMemory, Layout, Location, Pixels};
pub use watch::PATIENCE;

use super::{
    ActivateError, Activation, VirtioDevice,
    queue::{DeviceQueue, QueueError, QueueHandler, Request, Worker},
    read_bytes,
};
use crate::memory::AddressSpace;
use commands::{Answer, CommandError, Input};
use protocol::*;
use watch::Hold;

const QUEUE_SIZES: &[u16] = &[256, 16];
const FEATURES: u64 = VIRTIO_GPU_F_EDID
    | VIRTIO_GPU_F_RESOURCE_UUID
    | VIRTIO_GPU_F_RESOURCE_BLOB
    | VIRTIO_GPU_F_BLOB_ALIGNMENT;

/// The GPU device.
#[derive(Debug)]
pub struct Gpu {
    display: DisplayHandle,
    map: Arc<AddressSpace>,
    worker: Option<Worker>,
}

impl Gpu {
    /// A device that drives `display`; blobs are looked up in `map`.
    pub fn new(display: DisplayHandle, map: Arc<AddressSpace>) -> Self {
        display.follow(&map);
        Self {
            display,
            map,
            worker: None,
        }
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
        FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = Config {
            events_read: self.display.0.lock().events.into(),
            num_scanouts: (OUTPUTS as u32).into(),
            blob_alignment: BLOB_ALIGNMENT.into(),
            ..Default::default()
        };
        read_bytes(config.as_bytes(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        const EVENTS_CLEAR: u64 = std::mem::offset_of!(Config, events_clear) as u64;
        if let (EVENTS_CLEAR, &[a, b, c, d]) = (offset, data) {
            let events = u32::from_le_bytes([a, b, c, d]);
            self.display.0.lock().clear_events(events);
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags);
        let timer = timer.map_err(|error| ActivateError::Host {
            device: "gpu",
            action: "make a timer".into(),
            source: error.into(),
        })?;
        let handler = Handler {
            control: activation.take_queue(CONTROL_QUEUE)?,
            // Firmware's drivers, such as EDK2's, have no use for cursors.
            cursor: activation.take_optional_queue(CURSOR_QUEUE),
            display: self.display.clone(),
            map: self.map.clone(),
            held: Vec::new(),
            timer,
            told: false,
        };
        let mut state = self.display.0.lock();
        state.features = activation.features;
        state.status = Some(activation.status.clone());
        drop(state);
        self.worker = Some(Worker::spawn("gpu", activation.status, handler)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
        self.display.0.lock().reset();
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.reset();
    }
}

/// A fenced answer that waits for those who show the frame.
#[derive(Debug)]
struct Held {
    head: u16,
    written: u32,
    hold: Hold,
    until: Instant,
}

struct Handler {
    control: DeviceQueue,
    cursor: Option<DeviceQueue>,
    display: DisplayHandle,
    map: Arc<AddressSpace>,
    /// In the order in which they came; no more than the control queue has room for.
    held: Vec<Held>,
    timer: OwnedFd,
    /// Whether a failure of the host's has been logged. The driver could have many.
    told: bool,
}

const CONTROL: usize = 0;
const RELEASED: usize = 1;
const TIMER: usize = 2;

impl QueueHandler for Handler {
    fn sources(&self) -> Vec<RawFd> {
        let cursor = self.cursor.as_ref();
        [
            self.control.kick().as_raw_fd(),
            self.display.0.released.as_raw_fd(),
            self.timer.as_raw_fd(),
        ]
        .into_iter()
        .chain(cursor.map(|queue| queue.kick().as_raw_fd()))
        .collect()
    }

    fn ready(&mut self, source: usize) -> Result<(), QueueError> {
        match source {
            CONTROL => self.serve_control(),
            RELEASED => {
                let _ = self.display.0.released.read();
                self.release_held()
            }
            TIMER => {
                // It may have been set again since it went off.
                let _ = rustix::io::read(&self.timer, &mut [0; 8]);
                self.release_held()
            }
            _ => self.serve_cursor(),
        }
    }
}

impl Handler {
    fn serve_control(&mut self) -> Result<(), QueueError> {
        self.control.clear_kick();
        loop {
            self.control.set_notification(false)?;
            while let Some(request) = self.control.pop()? {
                let head = request.head;
                let mem = self.control.memory();
                let (written, hold) = answer(mem, request, &mut self.told, |type_, input| {
                    self.display.0.lock().control(type_, input, &self.map)
                });
                match hold {
                    None => self.control.push(head, written)?,
                    Some(hold) => {
                        let until = Instant::now() + PATIENCE;
                        self.held.push(Held {
                            head,
                            written,
                            hold,
                            until,
                        });
                        self.arm_timer()?;
                    }
                }
            }
            if !self.control.set_notification(true)? {
                return Ok(());
            }
        }
    }

    fn serve_cursor(&mut self) -> Result<(), QueueError> {
        let Some(cursor) = &mut self.cursor else {
            return Ok(());
        };
        cursor.clear_kick();
        let (display, told) = (&self.display, &mut self.told);
        cursor.drain(|mem, request| {
            let (written, _) = answer(mem, request, told, |type_, input| {
                display.0.lock().cursor(type_, input)
            });
            Ok(written)
        })
    }

    /// Answers what nobody, or nobody in time, waits with.
    fn release_held(&mut self) -> Result<(), QueueError> {
        let now = Instant::now();
        while let Some(first) = self.held.first() {
            if first.until <= now {
                first.hold.give_up();
            } else if !first.hold.is_over() {
                break;
            }
            let Held { head, written, .. } = self.held.remove(0);
            self.control.push(head, written)?;
        }
        self.arm_timer()
    }

    fn arm_timer(&mut self) -> Result<(), QueueError> {
        let Some(first) = self.held.first() else {
            return Ok(());
        };
        let left = first.until.saturating_duration_since(Instant::now());
        // Nothing at all would disarm it.
        let left = left.max(Duration::from_millis(1));
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            },
        };
        rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)
            .map(drop)
            .map_err(|error| QueueError::Host {
                action: "set a timer",
                source: error.into(),
            })
    }
}

/// Reads a command, has it carried out and writes the response (5.7.6.7). How many bytes that were, and
/// what holds the response back.
fn answer(
    mem: &crate::GuestMemory,
    request: Request,
    told: &mut bool,
    execute: impl FnOnce(u32, &mut Input) -> Result<Answer, CommandError>,
) -> (u32, Option<Hold>) {
    let mut input = Input {
        mem,
        buffers: request.readable,
    };
    // Without a header there is no fence to speak of either.
    let header = input.take::<CtrlHdr>();
    let fence = header
        .as_ref()
        .map_or(CtrlHdr::default(), |header| CtrlHdr {
            type_: 0.into(),
            flags: (header.flags.get() & VIRTIO_GPU_FLAG_FENCE).into(),
            padding: [0; 3],
            ..*header
        });
    let answer = header
        .and_then(|header| execute(header.type_.get(), &mut input))
        .unwrap_or_else(|error| {
            match &error {
                CommandError::Host(_) if !std::mem::replace(told, true) => {
                    tracing::warn!(error = %crate::error_line(&error), "no memory for the guest's GPU");
                }
                // Rare, and told by nobody else: Linux's driver does not read the answer.
                CommandError::Memory(_) => {
                    tracing::info!("refused memory of the guest's GPU driver: {}", crate::error_line(&error));
                }
                _ => tracing::debug!(
                    error = %crate::error_line(&error),
                    "refused a command of the guest's GPU driver"
                ),
            }
            Answer::from(&error)
        });
    let fenced = fence.flags.get() != 0;
    let mut response = CtrlHdr {
        type_: answer.type_.into(),
        ..fence
    }
    .as_bytes()
    .to_vec();
    response.extend(answer.body);
    let written = request.writable.write(mem, &response).unwrap_or(0);
    let hold = answer.hold.filter(|hold| fenced && !hold.is_over());
    (written as u32, hold)
}

#[cfg(test)]
mod tests;
