//! 3D (Virtio 1.4, 5.7.6.9): commands for a renderer in a process of its own, which alone hands the guest's
//! command streams to code that is not Rust's.
//!
//! The device checks what a command names, sends it on, and takes no other from the control queue until the
//! renderer has answered; its thread never waits for it, so that a renderer that hangs holds up the guest's
//! 3D and nothing else. Fences are passed when the renderer says so, in any order between rings.
//!
//! A renderer that ends is not started again while the driver lives: its contexts are lost, and all that
//! needs it is answered with an error. The next driver gets a new one.

mod blob_files;
mod commands;
mod host_memory;
mod outputs;
#[cfg(test)]
mod tests;
pub mod wire;

use std::{
    collections::BTreeSet,
    fmt, io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::Arc,
};

use rustix::net::RecvFlags;

pub use host_memory::HostMemory;
pub use outputs::ReadBack;

use super::{
    commands::{Answer, CommandError},
    display::DisplayHandle,
    protocol::*,
    resource::HostKind,
};
use crate::{memory::AddressSpace, virtio::queue::Buffers};
use blob_files::BlobFiles;
use wire::{
    CALL_FENCE, Call, CapsetInfo, FAILED_NO_FILES, FenceAt, SAY_DONE, SAY_FENCE, SAY_READY, Say,
};

/// Calls on their way that are not answered: far fewer than a socket takes.
const MAX_TOLD: usize = 32;

/// A renderer that was started. It need not be ready.
pub struct Connection {
    /// Packets of [`wire`].
    pub socket: OwnedFd,
    /// Ends the process when dropped.
    pub process: Box<dyn Send>,
}

/// Starts renderers.
pub trait StartRenderer: Send + Sync + fmt::Debug {
    /// Starts one, and does not wait for it.
    fn start(&self) -> io::Result<Connection>;
}

/// What a GPU needs to draw in 3D.
#[derive(Clone, Debug)]
pub struct Rendering {
    /// Where renderers come from.
    pub starter: Arc<dyn StartRenderer>,
    /// What they can do.
    pub capsets: Vec<CapsetInfo>,
    /// Where blobs are shown.
    pub memory: Arc<HostMemory>,
}

/// What comes after the renderer's answer.
#[derive(Debug)]
pub(super) enum Then {
    /// That is all.
    Answer,
    /// An answer that was there before.
    Give(Answer),
    /// The content of a capability set.
    Capset,
    /// The resource exists.
    Created { id: u32, kind: HostKind },
    /// The blob's memory came.
    Map { id: u32, offset: u64 },
    /// The resource has guest memory, or has it no longer.
    Backed { id: u32, backed: bool },
    /// The pixels came.
    Flush(ResourceFlush),
    /// The memory came of a blob that an output is to show.
    Scanout(SetScanoutBlob),
    /// The memory came of a texture that an output is to show, or there is none.
    Texture(SetScanout),
}

/// What became of a command.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It is done.
    Now(Answer),
    /// It is the renderer's.
    Later(Box<Call>, Then),
    /// It is done, and the renderer is told.
    Told(Box<Call>, Answer),
}

impl From<Answer> for Outcome {
    fn from(answer: Answer) -> Self {
        Self::Now(answer)
    }
}

/// A request of the driver's that the device has taken.
#[derive(Debug)]
pub(super) struct Pending {
    pub head: u16,
    pub writable: Buffers,
    /// The header of its answer, but for the type.
    pub header: CtrlHdr,
    /// Where in the order of fences it is.
    pub fence: FenceAt,
}

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

/// What the renderer said that concerns the driver.
#[derive(Debug)]
pub(super) enum Heard {
    /// A request is done.
    Done(Pending, Result<Answer, CommandError>),
    /// Requests whose answers are written can go back: head and length of each.
    Passed(Vec<(u16, u32)>),
    /// The renderer is no more: what it was asked for last, and all that waited for a fence.
    Died(
        Option<(Pending, Result<Answer, CommandError>)>,
        Vec<(u16, u32)>,
    ),
}

/// The device's side of one renderer.
pub(super) struct Renderer {
    rendering: Rendering,
    /// Stays open after the renderer has ended: it is waited on.
    socket: OwnedFd,
    process: Option<Box<dyn Send>>,
    contexts: BTreeSet<u32>,
    asked: Option<Asked>,
    fences: Vec<Fenced>,
    /// Of the last fence.
    number: u32,
    files: BlobFiles,
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
    pub fn hear(&mut self, display: &DisplayHandle) -> Option<Heard> {
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
                SAY_DONE if self.asked.is_some() => return self.done(say, display),
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

    fn done(&mut self, say: Say, display: &DisplayHandle) -> Option<Heard> {
        let Asked {
            mut pending,
            then,
            passed,
        } = self.asked.take()?;
        if passed || say.head.fence.number == 0 {
            pending.fence = FenceAt::default();
        }
        let result = match say.head.failed {
            0 => self.finish(then, say, display),
            FAILED_NO_FILES => Err(CommandError::RendererFiles),
            _ => Err(CommandError::Renderer),
        };
        Some(Heard::Done(pending, result))
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

/// What commands are looked up in.
pub(super) struct Places<'a> {
    pub display: &'a DisplayHandle,
    pub map: &'a AddressSpace,
}
