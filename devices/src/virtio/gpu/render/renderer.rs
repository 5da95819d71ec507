//! The connection to one renderer: the request in flight, and the fences that are awaited.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use rustix::net::RecvFlags;

use super::{
    super::{error::CommandError, protocol::*},
    blob_files::BlobFiles,
    completion::{Completion, PendingRequest, RendererEvent},
    process::{Connection, Rendering},
    wire::{
        FAILED_NO_FILES, FencePosition, REPLY_DONE, REPLY_FENCE, REPLY_READY, REQUEST_FENCE, Reply,
        Request,
    },
};

#[derive(Debug)]
struct InFlight {
    pending: PendingRequest,
    completion: Completion,
    /// Its fence was reported before its reply.
    passed: bool,
}

/// A response that awaits a fence.
#[derive(Debug)]
struct Fenced {
    at: FencePosition,
    head: u16,
    written: u32,
}

/// Requests on their way without a reply: far fewer than a socket holds.
pub const MAX_UNANSWERED: usize = 32;

/// The device side of one renderer.
pub struct Renderer {
    pub(super) rendering: Rendering,
    /// Stays open after the renderer has ended: the worker waits on it.
    socket: OwnedFd,
    pub(super) process: Option<Box<dyn Send>>,
    pub(super) contexts: BTreeSet<u32>,
    in_flight: Option<InFlight>,
    fences: Vec<Fenced>,
    /// Number of the last fence.
    number: u32,
    pub(super) files: BlobFiles,
    /// Requests without a reply, since the last one with a reply.
    unanswered: usize,
}

impl Renderer {
    pub fn start(rendering: &Rendering) -> io::Result<Self> {
        let Connection { socket, process } = rendering.starter.start()?;
        Ok(Self {
            rendering: rendering.clone(),
            socket,
            process: Some(process),
            contexts: BTreeSet::new(),
            in_flight: None,
            fences: Vec::new(),
            number: 0,
            files: BlobFiles::default(),
            unanswered: 0,
        })
    }

    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Whether a command can be taken.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_none()
    }

    /// The position of a request in the order of fences. Without a ring it is in the order of the device.
    pub fn fence(&mut self, header: &CtrlHdr) -> Result<FencePosition, CommandError> {
        let flags = header.flags.get();
        if flags & VIRTIO_GPU_FLAG_FENCE == 0 {
            return Ok(FencePosition::default());
        }
        let of_ring = flags & VIRTIO_GPU_FLAG_INFO_RING_IDX != 0;
        if of_ring && header.ring_idx >= VIRTIO_GPU_MAX_RINGS {
            return Err(CommandError::Parameter("ring"));
        }
        // Skips 0, which means no fence. No response waits for longer than a queue of numbers.
        self.number = self.number.checked_add(1).unwrap_or(1);
        let (context, ring) = if of_ring {
            (header.ctx_id.get(), header.ring_idx.into())
        } else {
            (0, 0)
        };
        Ok(FencePosition {
            of_ring: of_ring.into(),
            context,
            ring,
            number: self.number,
        })
    }

    /// Whether an earlier request of the same order waits: to Linux a fence covers all before it.
    pub fn must_wait_for_fence(&self, at: &FencePosition) -> bool {
        at.number != 0 && self.fences.iter().any(|fenced| same_order(&fenced.at, at))
    }

    /// A request for a fence only.
    pub fn fence_only() -> Request {
        Request::new(REQUEST_FENCE, 0, &[0_u8; 0])
    }

    /// Forwards a command that needs no reply. Returns it if it must have one, so that the socket does not fill.
    pub fn send_unanswered(&mut self, call: Box<Request>) -> Result<(), Box<Request>> {
        if self.unanswered >= MAX_UNANSWERED {
            return Err(call);
        }
        self.unanswered += 1;
        let mut call = call;
        call.head.unanswered = 1;
        if let Err(error) = call.send(&self.socket) {
            // An ended renderer is noticed when the socket is read.
            tracing::debug!(%error, "cannot tell the renderer");
        }
        Ok(())
    }

    /// Sends a command. The request comes back by [`Renderer::receive`], or at once.
    pub fn ask(
        &mut self,
        mut call: Request,
        completion: Completion,
        pending: PendingRequest,
    ) -> Result<(), Box<(PendingRequest, CommandError)>> {
        call.head.fence = pending.fence;
        self.unanswered = 0;
        if self.process.is_none() {
            return Err(Box::new((pending, CommandError::NoRenderer)));
        }
        match call.send(&self.socket) {
            Ok(()) => {
                self.in_flight = Some(InFlight {
                    pending,
                    completion,
                    passed: false,
                });
                Ok(())
            }
            Err(error) => {
                tracing::warn!(%error, "cannot send to the renderer");
                Err(Box::new((pending, CommandError::NoRenderer)))
            }
        }
    }

    /// Lets a response wait for its fence.
    pub fn wait(&mut self, at: FencePosition, head: u16, written: u32) {
        self.fences.push(Fenced { at, head, written });
    }

    /// The next event of the renderer; `None` if there is none now.
    pub fn receive(&mut self) -> Option<RendererEvent> {
        self.process.as_ref()?;
        loop {
            let reply = match Reply::receive(&self.socket, RecvFlags::DONTWAIT) {
                Ok(Some(reply)) => reply,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Ok(None) | Err(_) => return Some(self.died()),
            };
            match reply.head.what {
                REPLY_READY => {}
                REPLY_FENCE => {
                    let passed = self.passed(&reply.head.fence);
                    if !passed.is_empty() {
                        return Some(RendererEvent::FencesPassed(passed));
                    }
                }
                REPLY_DONE if self.in_flight.is_some() => return self.done(reply),
                _ => return Some(self.died()),
            }
        }
    }

    /// Responses that awaited this fence or an earlier one of its order.
    fn passed(&mut self, at: &FencePosition) -> Vec<(u16, u32)> {
        let is_past = |other: &FencePosition| {
            same_order(other, at) && at.number.wrapping_sub(other.number) <= u32::MAX / 2
        };
        if let Some(in_flight) = &mut self.in_flight
            && in_flight.pending.fence.number != 0
        {
            in_flight.passed |= is_past(&in_flight.pending.fence);
        }
        let passed = self.fences.extract_if(.., |fenced| is_past(&fenced.at));
        passed.map(|fenced| (fenced.head, fenced.written)).collect()
    }

    fn done(&mut self, reply: Reply) -> Option<RendererEvent> {
        let InFlight {
            mut pending,
            completion,
            passed,
        } = self.in_flight.take()?;
        if passed || reply.head.fence.number == 0 {
            pending.fence = FencePosition::default();
        }
        let result = match reply.head.failed {
            0 => Ok(reply),
            FAILED_NO_FILES => Err(CommandError::RendererFiles),
            _ => Err(CommandError::Renderer),
        };
        Some(RendererEvent::Replied(pending, completion, result))
    }

    /// The renderer has ended: everything that waits for it is completed.
    fn died(&mut self) -> RendererEvent {
        self.process = None;
        self.contexts.clear();
        self.files.clear();
        tracing::warn!(
            "the GPU's renderer has ended: the guest's 3D is lost until its driver is bound again; 2D goes on"
        );
        let in_flight = self.in_flight.take().map(|in_flight| {
            let mut pending = in_flight.pending;
            pending.fence = FencePosition::default();
            let answer = match in_flight.completion {
                Completion::Respond(answer) => Ok(answer),
                Completion::Ok
                | Completion::Capset
                | Completion::Created { .. }
                | Completion::Map { .. }
                | Completion::Backed { .. }
                | Completion::Flush(_)
                | Completion::Scanout(_)
                | Completion::Texture(_) => Err(CommandError::NoRenderer),
            };
            (pending, answer)
        });
        let waited = self.fences.drain(..);
        let waited = waited.map(|fenced| (fenced.head, fenced.written));
        RendererEvent::Ended(in_flight, waited.collect())
    }
}

fn same_order(one: &FencePosition, other: &FencePosition) -> bool {
    (one.of_ring, one.context, one.ring) == (other.of_ring, other.context, other.ring)
}
