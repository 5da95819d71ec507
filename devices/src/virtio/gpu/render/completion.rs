//! What becomes of a command: done at once, or once the renderer has replied.

use super::{
    super::{
        error::CommandError, protocol::*, resource::HostKind, response::Response,
        state::SharedState,
    },
    wire::{FencePosition, Reply, Request},
};
use crate::{memory::AddressSpace, virtio::Buffers};

/// What comes after the renderer's answer.
#[derive(Debug)]
pub enum Completion {
    /// That is all.
    Ok,
    /// An answer that was there before.
    Respond(Response),
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
pub enum CommandOutcome {
    /// It is done.
    Done(Response),
    /// It is the renderer's.
    Ask(Box<Request>, Completion),
    /// It is done, and the renderer is told.
    DoneAndForward(Box<Request>, Response),
}

impl From<Response> for CommandOutcome {
    fn from(answer: Response) -> Self {
        Self::Done(answer)
    }
}

/// A request of the driver's that the device has taken.
#[derive(Debug)]
pub struct PendingRequest {
    pub head: u16,
    pub writable: Buffers,
    /// The header of its answer, but for the type.
    pub header: CtrlHdr,
    /// Where in the order of fences it is.
    pub fence: FencePosition,
}

/// What the renderer said that concerns the driver.
#[derive(Debug)]
pub enum RendererEvent {
    /// A request is done.
    Replied(PendingRequest, Completion, Result<Reply, CommandError>),
    /// Requests whose answers are written can go back: head and length of each.
    FencesPassed(Vec<(u16, u32)>),
    /// The renderer is no more: what it was asked for last, and all that waited for a fence.
    Ended(
        Option<(PendingRequest, Result<Response, CommandError>)>,
        Vec<(u16, u32)>,
    ),
}

/// Has the renderer asked, and the command finished by `completion`.
pub fn later(call: Request, completion: Completion) -> Result<CommandOutcome, CommandError> {
    Ok(CommandOutcome::Ask(Box::new(call), completion))
}

/// What commands are looked up in.
pub struct CommandContext<'a> {
    pub state: &'a SharedState,
    pub map: &'a AddressSpace,
}
