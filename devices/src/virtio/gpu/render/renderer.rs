//! The device's end of the socket to one renderer: what was asked, and which fences are awaited.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use rustix::net::RecvFlags;

use super::{
    super::{error::CommandError, protocol::*},
    blob_files::BlobFiles,
    completion::{Heard, Pending, Then},
    process::{Connection, Rendering},
    wire::{CALL_FENCE, Call, FAILED_NO_FILES, FenceAt, SAY_DONE, SAY_FENCE, SAY_READY, Say},
};

#[derive(Debug)]
struct Asked {
    pending: Pending,
    then: Then,
    /// Its fence was told of before its answer.
    passed: bool,
}

/// An answer that waits for a fence.
#[derive(Debug)]
struct Fenced {
    at: FenceAt,
    head: u16,
    written: u32,
}

/// Calls on their way that are not answered: far fewer than a socket takes.
pub const MAX_TOLD: usize = 32;

/// The device's side of one renderer.
pub struct Renderer {
    pub(super) rendering: Rendering,
    /// Stays open after the renderer has ended: it is waited on.
    socket: OwnedFd,
    pub(super) process: Option<Box<dyn Send>>,
    pub(super) contexts: BTreeSet<u32>,
    asked: Option<Asked>,
    fences: Vec<Fenced>,
    /// Of the last fence.
    number: u32,
    pub(super) files: BlobFiles,
    /// Calls that went without an answer since the last one that has one.
    told: usize,
}

impl Renderer {
    pub fn start(rendering: &Rendering) -> io::Result<Self> {
        let Connection { socket, process } = rendering.starter.start()?;
        Ok(Self {
            rendering: rendering.clone(),
            socket,
            process: Some(process),
            contexts: BTreeSet::new(),
            asked: None,
            fences: Vec::new(),
            number: 0,
            files: BlobFiles::default(),
            told: 0,
        })
    }

    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Whether a command can be taken.
    pub fn is_idle(&self) -> bool {
        self.asked.is_none()
    }

    /// Where a request stands in the order of fences. One that has no ring stands in that of the device.
    pub fn fence(&mut self, header: &CtrlHdr) -> Result<FenceAt, CommandError> {
        let flags = header.flags.get();
        if flags & VIRTIO_GPU_FLAG_FENCE == 0 {
            return Ok(FenceAt::default());
        }
        let of_ring = flags & VIRTIO_GPU_FLAG_INFO_RING_IDX != 0;
        if of_ring && header.ring_idx >= VIRTIO_GPU_MAX_RINGS {
            return Err(CommandError::Parameter("ring"));
        }
        // Skips 0, which is none; answers wait no longer than a queue is.
        self.number = self.number.checked_add(1).unwrap_or(1);
        let (context, ring) = if of_ring {
            (header.ctx_id.get(), header.ring_idx.into())
        } else {
            (0, 0)
        };
        Ok(FenceAt {
            of_ring: of_ring.into(),
            context,
            ring,
            number: self.number,
        })
    }

    /// Whether an earlier request of the device's own order waits: Linux takes a fence for all before it.
    pub fn must_wait(&self, at: &FenceAt) -> bool {
        at.number != 0 && self.fences.iter().any(|fenced| same_order(&fenced.at, at))
    }

    /// A call that only asks for a fence.
    pub fn fence_only() -> Call {
        Call::new(CALL_FENCE, 0, &[0_u8; 0])
    }

    /// Sends a command on that needs no answer; gives it back if it must have one, lest the socket be full.
    pub fn tell(&mut self, call: Box<Call>) -> Result<(), Box<Call>> {
        if self.told >= MAX_TOLD {
            return Err(call);
        }
        self.told += 1;
        let mut call = call;
        call.head.unanswered = 1;
        if let Err(error) = call.send(&self.socket) {
            // Heard of when the socket is.
            tracing::debug!(%error, "cannot tell the renderer");
        }
        Ok(())
    }

    /// Sends a command on. The request comes back by [`Renderer::hear`], or at once.
    pub fn ask(
        &mut self,
        mut call: Call,
        then: Then,
        pending: Pending,
    ) -> Result<(), Box<(Pending, CommandError)>> {
        call.head.fence = pending.fence;
        self.told = 0;
        if self.process.is_none() {
            return Err(Box::new((pending, CommandError::NoRenderer)));
        }
        match call.send(&self.socket) {
            Ok(()) => {
                self.asked = Some(Asked {
                    pending,
                    then,
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

    /// Has the answer of a request wait for its fence.
    pub fn wait(&mut self, at: FenceAt, head: u16, written: u32) {
        self.fences.push(Fenced { at, head, written });
    }

    /// Takes what the renderer says; `None` if that is nothing now.
    pub fn hear(&mut self) -> Option<Heard> {
        self.process.as_ref()?;
        loop {
            let say = match Say::receive(&self.socket, RecvFlags::DONTWAIT) {
                Ok(Some(say)) => say,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Ok(None) | Err(_) => return Some(self.died()),
            };
            match say.head.what {
                SAY_READY => {}
                SAY_FENCE => {
                    let heard = self.passed(&say.head.fence);
                    if !heard.is_empty() {
                        return Some(Heard::Passed(heard));
                    }
                }
                SAY_DONE if self.asked.is_some() => return self.done(say),
                _ => return Some(self.died()),
            }
        }
    }

    /// Answers that waited for this fence or, in its order, an earlier one.
    fn passed(&mut self, at: &FenceAt) -> Vec<(u16, u32)> {
        let is_past = |other: &FenceAt| {
            same_order(other, at) && at.number.wrapping_sub(other.number) <= u32::MAX / 2
        };
        if let Some(asked) = &mut self.asked
            && asked.pending.fence.number != 0
        {
            asked.passed |= is_past(&asked.pending.fence);
        }
        let passed = self.fences.extract_if(.., |fenced| is_past(&fenced.at));
        passed.map(|fenced| (fenced.head, fenced.written)).collect()
    }

    fn done(&mut self, say: Say) -> Option<Heard> {
        let Asked {
            mut pending,
            then,
            passed,
        } = self.asked.take()?;
        if passed || say.head.fence.number == 0 {
            pending.fence = FenceAt::default();
        }
        let result = match say.head.failed {
            0 => Ok(say),
            FAILED_NO_FILES => Err(CommandError::RendererFiles),
            _ => Err(CommandError::Renderer),
        };
        Some(Heard::Done(pending, then, result))
    }

    /// The renderer is no more: all that waits for it is answered.
    fn died(&mut self) -> Heard {
        self.process = None;
        self.contexts.clear();
        self.files.clear();
        tracing::warn!(
            "the GPU's renderer has ended: the guest's 3D is lost until its driver is bound again; 2D goes on"
        );
        let asked = self.asked.take().map(|asked| {
            let mut pending = asked.pending;
            pending.fence = FenceAt::default();
            let answer = match asked.then {
                Then::Give(answer) => Ok(answer),
                _ => Err(CommandError::NoRenderer),
            };
            (pending, answer)
        });
        let waited = self.fences.drain(..);
        let waited = waited.map(|fenced| (fenced.head, fenced.written));
        Heard::Died(asked, waited.collect())
    }
}

fn same_order(one: &FenceAt, other: &FenceAt) -> bool {
    (one.of_ring, one.context, one.ring) == (other.of_ring, other.context, other.ring)
}
