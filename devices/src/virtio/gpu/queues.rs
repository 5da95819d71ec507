//! The queues of the GPU and the thread that serves them.

use std::{
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use zerocopy::IntoBytes;

use super::{
    display::DisplayHandle,
    error::CommandError,
    protocol::*,
    render::{
        CommandContext, CommandOutcome, Completion, PendingRequest, Renderer, RendererEvent,
        wire::{FencePosition, Reply},
    },
    request::Input,
    response::Response,
    subscriber::{FlushFence, MAX_FENCE_DELAY},
};
use crate::{
    memory::AddressSpace,
    virtio::{ActivateError, Activation, Buffers, DeviceQueue, QueueError, QueueHandler, Request},
};

/// A fenced response that is deferred until subscribers release the frame.
#[derive(Debug)]
struct DeferredResponse {
    head: u16,
    written: u32,
    fence: FlushFence,
    until: Instant,
}

pub struct Queues {
    control: DeviceQueue,
    cursor: Option<DeviceQueue>,
    display: DisplayHandle,
    map: Arc<AddressSpace>,
    renderer: Option<Renderer>,
    /// In the order of the requests; no more than the control queue has room for.
    deferred: Vec<DeferredResponse>,
    timer: OwnedFd,
    /// Whether a failure of the host has been logged. The driver could cause many.
    logged: bool,
}

const CONTROL: usize = 0;
const RELEASED: usize = 1;
const TIMER: usize = 2;
/// The cursor queue if there is one, then the renderer.
const CURSOR: usize = 3;

impl Queues {
    /// Takes the queues that the driver set up.
    pub fn new(
        activation: &mut Activation,
        display: &DisplayHandle,
        map: &Arc<AddressSpace>,
        renderer: Option<Renderer>,
    ) -> Result<Self, ActivateError> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags);
        let timer = timer.map_err(|error| ActivateError::Host {
            device: "gpu",
            action: "make a timer".into(),
            source: error.into(),
        })?;
        Ok(Self {
            control: activation.take_queue(CONTROL_QUEUE)?,
            // Drivers of firmware, such as EDK2, do not set up the cursor queue.
            cursor: activation.take_optional_queue(CURSOR_QUEUE),
            display: display.clone(),
            map: map.clone(),
            renderer,
            deferred: Vec::new(),
            timer,
            logged: false,
        })
    }
}

impl QueueHandler for Queues {
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
                self.send_deferred()
            }
            TIMER => {
                // The timer may have been set again since it expired.
                let _ = rustix::io::read(&self.timer, &mut [0; 8]);
                self.send_deferred()
            }
            CURSOR if self.cursor.is_some() => self.serve_cursor(),
            _ => self.receive_from_renderer(),
        }
    }
}

impl Queues {
    fn serve_control(&mut self) -> Result<(), QueueError> {
        loop {
            self.control.set_notification(false)?;
            while self.renderer.as_ref().is_none_or(Renderer::is_idle) {
                let Some(request) = self.control.pop()? else {
                    break;
                };
                self.serve(request)?;
            }
            // Further requests are taken when the renderer has replied.
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
            let (written, fence) = answer(&mem, request, &mut self.logged, |header, input| {
                let type_ = header.type_.get();
                self.display.0.state.lock().control(type_, input, &self.map)
            });
            return self.give(head, written, fence);
        };
        let mut input = Input {
            mem: &mem,
            buffers: request.readable,
        };
        let mut pending = PendingRequest {
            head,
            writable: request.writable,
            header: CtrlHdr::default(),
            fence: FencePosition::default(),
        };
        let context = CommandContext {
            state: &self.display.0.state,
            map: &self.map,
        };
        let outcome = input.take::<CtrlHdr>().and_then(|header| {
            pending.header = fence_of(&header);
            pending.fence = renderer.fence(&header)?;
            renderer.command(&header, &mut input, &context)
        });
        let (call, completion) = match outcome {
            Ok(CommandOutcome::Done(answer)) if renderer.must_wait_for_fence(&pending.fence) => {
                (Renderer::fence_only(), Completion::Respond(answer))
            }
            Ok(CommandOutcome::Done(answer)) => {
                pending.fence = FencePosition::default();
                return self.finish(pending, Ok(answer));
            }
            Ok(CommandOutcome::Ask(call, completion)) => (*call, completion),
            // A fence needs a reply.
            Ok(CommandOutcome::DoneAndForward(call, answer)) if pending.fence.number != 0 => {
                (*call, Completion::Respond(answer))
            }
            Ok(CommandOutcome::DoneAndForward(call, answer)) => {
                match renderer.send_unanswered(call) {
                    Ok(()) => return self.finish(pending, Ok(answer)),
                    Err(call) => (*call, Completion::Respond(answer)),
                }
            }
            Err(error) => {
                pending.fence = FencePosition::default();
                return self.finish(pending, Err(error));
            }
        };
        match renderer.ask(call, completion, pending) {
            Ok(()) => Ok(()),
            Err(refused) => {
                let (mut pending, error) = *refused;
                pending.fence = FencePosition::default();
                self.finish(pending, Err(error))
            }
        }
    }

    /// Writes the response to a request, and returns the request now or when its fence is passed.
    fn finish(
        &mut self,
        pending: PendingRequest,
        answer: Result<Response, CommandError>,
    ) -> Result<(), QueueError> {
        let mem = self.control.memory();
        let (written, fence) = respond(
            mem,
            pending.header,
            &pending.writable,
            answer,
            &mut self.logged,
        );
        match &mut self.renderer {
            Some(renderer) if pending.fence.number != 0 && fence.is_none() => {
                renderer.wait(pending.fence, pending.head, written);
                Ok(())
            }
            _ => self.give(pending.head, written, fence),
        }
    }

    fn give(
        &mut self,
        head: u16,
        written: u32,
        fence: Option<FlushFence>,
    ) -> Result<(), QueueError> {
        let Some(fence) = fence else {
            return self.control.push(head, written);
        };
        self.deferred.push(DeferredResponse {
            head,
            written,
            fence,
            until: Instant::now() + MAX_FENCE_DELAY,
        });
        self.arm_timer()
    }

    fn give_all(&mut self, answers: Vec<(u16, u32)>) -> Result<(), QueueError> {
        for (head, written) in answers {
            self.control.push(head, written)?;
        }
        Ok(())
    }

    fn receive_from_renderer(&mut self) -> Result<(), QueueError> {
        while let Some(event) = self.renderer.as_mut().and_then(|r| r.receive()) {
            match event {
                RendererEvent::Replied(pending, completion, reply) => {
                    let answer = reply.and_then(|reply| self.complete(completion, reply));
                    self.finish(pending, answer)?;
                    self.serve_control()?;
                }
                RendererEvent::FencesPassed(answers) => self.give_all(answers)?,
                RendererEvent::Ended(in_flight, answers) => {
                    self.give_all(answers)?;
                    if let Some((pending, answer)) = in_flight {
                        self.finish(pending, answer)?;
                    }
                    self.serve_control()?;
                }
            }
        }
        Ok(())
    }

    /// Completes a command after the reply of the renderer.
    fn complete(&mut self, completion: Completion, reply: Reply) -> Result<Response, CommandError> {
        let renderer = self.renderer.as_mut().ok_or(CommandError::NoRenderer)?;
        renderer.finish(completion, reply, &self.display.0.state)
    }

    fn serve_cursor(&mut self) -> Result<(), QueueError> {
        let Some(cursor) = &mut self.cursor else {
            return Ok(());
        };
        cursor.clear_kick();
        let (display, logged) = (&self.display, &mut self.logged);
        cursor.drain(|mem, request| {
            let (written, _) = answer(mem, request, logged, |header, input| {
                display.0.state.lock().cursor(header.type_.get(), input)
            });
            Ok(written)
        })
    }

    /// Sends the deferred responses whose fences are signalled or have expired.
    fn send_deferred(&mut self) -> Result<(), QueueError> {
        let now = Instant::now();
        while let Some(first) = self.deferred.first() {
            if first.until <= now {
                first.fence.expire();
            } else if !first.fence.is_signalled() {
                break;
            }
            let DeferredResponse { head, written, .. } = self.deferred.remove(0);
            self.control.push(head, written)?;
        }
        self.arm_timer()
    }

    fn arm_timer(&mut self) -> Result<(), QueueError> {
        let Some(first) = self.deferred.first() else {
            return Ok(());
        };
        let left = first.until.saturating_duration_since(Instant::now());
        // Zero would disarm it.
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

/// Reads a command, executes it and writes the response (5.7.6.7). Returns the number of bytes written, and the
/// fence that defers the response.
fn answer(
    mem: &crate::GuestMemory,
    request: Request,
    logged: &mut bool,
    execute: impl FnOnce(&CtrlHdr, &mut Input) -> Result<Response, CommandError>,
) -> (u32, Option<FlushFence>) {
    let mut input = Input {
        mem,
        buffers: request.readable,
    };
    // Without a header there is no fence either.
    let header = input.take::<CtrlHdr>();
    let fence = header.as_ref().map_or(CtrlHdr::default(), fence_of);
    let answer = header.and_then(|header| execute(&header, &mut input));
    respond(mem, fence, &request.writable, answer, logged)
}

/// The fields of a request header that the response repeats.
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
    header: CtrlHdr,
    writable: &Buffers,
    answer: Result<Response, CommandError>,
    logged: &mut bool,
) -> (u32, Option<FlushFence>) {
    let response = answer.unwrap_or_else(|error| {
        match &error {
            error if error.is_of_host() && !std::mem::replace(logged, true) => {
                tracing::warn!(error = %crate::error_line(&error), "no memory for the guest's GPU");
            }
            // Rare, and worth a line: the driver of Linux does not read the response.
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
        Response::from(&error)
    });
    let fenced = header.flags.get() & VIRTIO_GPU_FLAG_FENCE != 0;
    let mut bytes = CtrlHdr {
        type_: response.type_.into(),
        ..header
    }
    .as_bytes()
    .to_vec();
    bytes.extend(response.body);
    let written = writable.write(mem, &bytes).unwrap_or(0);
    let fence = response
        .fence
        .filter(|fence| fenced && !fence.is_signalled());
    (written as u32, fence)
}
