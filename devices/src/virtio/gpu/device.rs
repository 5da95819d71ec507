//! The device: its queues, and the thread that serves them.

use std::{
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use zerocopy::IntoBytes;

use super::{
    commands::{Answer, BLOB_ALIGNMENT, CommandError, Input},
    display::DisplayHandle,
    output::OUTPUTS,
    protocol::*,
    render::{Heard, Outcome, Pending, Places, Renderer, Rendering, Then, wire::FenceAt},
    watch::{Hold, PATIENCE},
};
use crate::{
    memory::AddressSpace,
    virtio::{
        ActivateError, Activation, VirtioDevice,
        queue::{Buffers, DeviceQueue, QueueError, QueueHandler, Request, Worker},
        read_bytes,
        transport::SharedMemory,
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
            events_read: self.display.0.lock().events.into(),
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
        // A driver that does not take 3D has none.
        let wanted = activation.features & VIRTIO_GPU_F_VIRGL != 0;
        let rendering = self.rendering.as_ref().filter(|_| wanted);
        let renderer = rendering.map(Renderer::start).transpose();
        let handler = Handler {
            renderer: renderer.map_err(|source| ActivateError::Host {
                device: "gpu",
                action: "start a renderer".into(),
                source,
            })?,
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
    renderer: Option<Renderer>,
    /// In the order in which they came; no more than the control queue has room for.
    held: Vec<Held>,
    timer: OwnedFd,
    /// Whether a failure of the host's has been logged. The driver could have many.
    told: bool,
}

const CONTROL: usize = 0;
const RELEASED: usize = 1;
const TIMER: usize = 2;
/// The cursor queue if there is one, then the renderer.
const CURSOR: usize = 3;

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
        .chain(self.renderer.as_ref().map(Renderer::fd))
        .collect()
    }

    fn ready(&mut self, source: usize) -> Result<(), QueueError> {
        match source {
            CONTROL => {
                self.control.clear_kick();
                self.serve_control()
            }
            RELEASED => {
                let _ = self.display.0.released.read();
                self.release_held()
            }
            TIMER => {
                // It may have been set again since it went off.
                let _ = rustix::io::read(&self.timer, &mut [0; 8]);
                self.release_held()
            }
            CURSOR if self.cursor.is_some() => self.serve_cursor(),
            _ => self.hear_renderer(),
        }
    }
}

impl Handler {
    fn serve_control(&mut self) -> Result<(), QueueError> {
        loop {
            self.control.set_notification(false)?;
            while self.renderer.as_ref().is_none_or(Renderer::is_idle) {
                let Some(request) = self.control.pop()? else {
                    break;
                };
                self.serve(request)?;
            }
            // What waits for the renderer's answer is looked at when it comes.
            if self.renderer.as_ref().is_some_and(|r| !r.is_idle())
                || !self.control.set_notification(true)?
            {
                return Ok(());
            }
        }
    }

    fn serve(&mut self, request: Request) -> Result<(), QueueError> {
        let mem = self.control.memory().clone();
        let head = request.head;
        let Some(renderer) = &mut self.renderer else {
            let (written, hold) = answer(&mem, request, &mut self.told, |header, input| {
                let type_ = header.type_.get();
                self.display.0.lock().control(type_, input, &self.map)
            });
            return self.give(head, written, hold);
        };
        let mut input = Input {
            mem: &mem,
            buffers: request.readable,
        };
        let mut pending = Pending {
            head,
            writable: request.writable,
            header: CtrlHdr::default(),
            fence: FenceAt::default(),
        };
        let places = Places {
            display: &self.display,
            map: &self.map,
        };
        let outcome = input.take::<CtrlHdr>().and_then(|header| {
            pending.header = fence_of(&header);
            pending.fence = renderer.fence(&header)?;
            renderer.command(&header, &mut input, &places)
        });
        let (call, then) = match outcome {
            Ok(Outcome::Now(answer)) if renderer.must_wait(&pending.fence) => {
                (Renderer::fence_only(), Then::Give(answer))
            }
            Ok(Outcome::Now(answer)) => {
                pending.fence = FenceAt::default();
                return self.finish(pending, Ok(answer));
            }
            Ok(Outcome::Later(call, then)) => (*call, then),
            // A fence needs an answer.
            Ok(Outcome::Told(call, answer)) if pending.fence.number != 0 => {
                (*call, Then::Give(answer))
            }
            Ok(Outcome::Told(call, answer)) => match renderer.tell(call) {
                Ok(()) => return self.finish(pending, Ok(answer)),
                Err(call) => (*call, Then::Give(answer)),
            },
            Err(error) => {
                pending.fence = FenceAt::default();
                return self.finish(pending, Err(error));
            }
        };
        match renderer.ask(call, then, pending) {
            Ok(()) => Ok(()),
            Err(refused) => {
                let (mut pending, error) = *refused;
                pending.fence = FenceAt::default();
                self.finish(pending, Err(error))
            }
        }
    }

    /// Writes the answer to a request, and gives it back now or when its fence is passed.
    fn finish(
        &mut self,
        pending: Pending,
        answer: Result<Answer, CommandError>,
    ) -> Result<(), QueueError> {
        let mem = self.control.memory();
        let (written, hold) = respond(
            mem,
            pending.header,
            &pending.writable,
            answer,
            &mut self.told,
        );
        match &mut self.renderer {
            Some(renderer) if pending.fence.number != 0 && hold.is_none() => {
                renderer.wait(pending.fence, pending.head, written);
                Ok(())
            }
            _ => self.give(pending.head, written, hold),
        }
    }

    fn give(&mut self, head: u16, written: u32, hold: Option<Hold>) -> Result<(), QueueError> {
        let Some(hold) = hold else {
            return self.control.push(head, written);
        };
        self.held.push(Held {
            head,
            written,
            hold,
            until: Instant::now() + PATIENCE,
        });
        self.arm_timer()
    }

    fn give_all(&mut self, answers: Vec<(u16, u32)>) -> Result<(), QueueError> {
        for (head, written) in answers {
            self.control.push(head, written)?;
        }
        Ok(())
    }

    fn hear_renderer(&mut self) -> Result<(), QueueError> {
        while let Some(heard) = self.renderer.as_mut().and_then(|r| r.hear(&self.display)) {
            match heard {
                Heard::Done(pending, answer) => {
                    self.finish(pending, answer)?;
                    self.serve_control()?;
                }
                Heard::Passed(answers) => self.give_all(answers)?,
                Heard::Died(asked, answers) => {
                    self.give_all(answers)?;
                    if let Some((pending, answer)) = asked {
                        self.finish(pending, answer)?;
                    }
                    self.serve_control()?;
                }
            }
        }
        Ok(())
    }

    fn serve_cursor(&mut self) -> Result<(), QueueError> {
        let Some(cursor) = &mut self.cursor else {
            return Ok(());
        };
        cursor.clear_kick();
        let (display, told) = (&self.display, &mut self.told);
        cursor.drain(|mem, request| {
            let (written, _) = answer(mem, request, told, |header, input| {
                display.0.lock().cursor(header.type_.get(), input)
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
    execute: impl FnOnce(&CtrlHdr, &mut Input) -> Result<Answer, CommandError>,
) -> (u32, Option<Hold>) {
    let mut input = Input {
        mem,
        buffers: request.readable,
    };
    // Without a header there is no fence to speak of either.
    let header = input.take::<CtrlHdr>();
    let fence = header.as_ref().map_or(CtrlHdr::default(), fence_of);
    let answer = header.and_then(|header| execute(&header, &mut input));
    respond(mem, fence, &request.writable, answer, told)
}

/// What of a request's header its response repeats.
fn fence_of(header: &CtrlHdr) -> CtrlHdr {
    let flags = VIRTIO_GPU_FLAG_FENCE | VIRTIO_GPU_FLAG_INFO_RING_IDX;
    CtrlHdr {
        type_: 0.into(),
        flags: (header.flags.get() & flags).into(),
        padding: [0; 3],
        ..*header
    }
}

fn respond(
    mem: &crate::GuestMemory,
    fence: CtrlHdr,
    writable: &Buffers,
    answer: Result<Answer, CommandError>,
    told: &mut bool,
) -> (u32, Option<Hold>) {
    let answer = answer.unwrap_or_else(|error| {
        match &error {
            error if error.is_of_host() && !std::mem::replace(told, true) => {
                tracing::warn!(error = %crate::error_line(&error), "no memory for the guest's GPU");
            }
            // Rare, and told by nobody else: Linux's driver does not read the answer.
            CommandError::Memory(_) => {
                tracing::info!(
                    "refused memory of the guest's GPU driver: {}",
                    crate::error_line(&error)
                );
            }
            _ => tracing::debug!(
                error = %crate::error_line(&error),
                "refused a command of the guest's GPU driver"
            ),
        }
        Answer::from(&error)
    });
    let fenced = fence.flags.get() & VIRTIO_GPU_FLAG_FENCE != 0;
    let mut response = CtrlHdr {
        type_: answer.type_.into(),
        ..fence
    }
    .as_bytes()
    .to_vec();
    response.extend(answer.body);
    let written = writable.write(mem, &response).unwrap_or(0);
    let hold = answer.hold.filter(|hold| fenced && !hold.is_over());
    (written as u32, hold)
}
