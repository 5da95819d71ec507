//! Results of a command: done at once, or completed by a reply of the renderer.

use super::{
    super::{
        error::CommandError, protocol::*, resource::HostKind, response::Response,
        state::SharedState,
    },
    wire::{FencePosition, Reply, Request},
};
use crate::{memory::AddressSpace, virtio::Buffers};

/// How a command is completed when the renderer has replied.
#[derive(Debug)]
pub enum Completion {
    /// It succeeded.
    Ok,
    /// With a response that was made before.
    Respond(Response),
    /// The reply is the content of a capability set.
    Capset,
    /// The resource exists.
    Created { id: u32, kind: HostKind },
    /// The reply has the memory of the blob, which is mapped.
    Map { id: u32, offset: u64 },
    /// The resource has guest memory, or has lost it.
    Backed { id: u32, backed: bool },
    /// The pixels were read back.
    Flush(ResourceFlush),
    /// The reply has the memory of a blob that an output is to show.
    Scanout(SetScanoutBlob),
    /// The reply has the memory of a texture that an output is to show, or has none.
    Texture(SetScanout),
}

/// The result of a command.
#[derive(Debug)]
pub enum CommandOutcome {
    /// It is done.
    Done(Response),
    /// The renderer is asked.
    Ask(Box<Request>, Completion),
    /// It is done, and forwarded to the renderer without a reply.
    DoneAndForward(Box<Request>, Response),
}

impl From<Response> for CommandOutcome {
    fn from(answer: Response) -> Self {
        Self::Done(answer)
    }
}

/// A request of the driver that the device has taken.
#[derive(Debug)]
pub struct PendingRequest {
    pub head: u16,
    pub writable: Buffers,
    /// The header of its response, except for the type.
    pub header: CtrlHdr,
    /// Its position in the order of fences.
    pub fence: FencePosition,
}

/// What the renderer did that concerns the driver.
#[derive(Debug)]
pub enum RendererEvent {
    /// It replied to the request in flight.
    Replied(PendingRequest, Completion, Result<Reply, CommandError>),
    /// Fences passed: requests whose responses are written can be returned. Head and length of each.
    FencesPassed(Vec<(u16, u32)>),
    /// It ended: the request in flight, and all responses that awaited a fence.
    Ended(
        Option<(PendingRequest, Result<Response, CommandError>)>,
        Vec<(u16, u32)>,
    ),
}

/// A command that the renderer is asked to carry out, completed by `completion`.
pub fn later(call: Request, completion: Completion) -> Result<CommandOutcome, CommandError> {
    Ok(CommandOutcome::Ask(Box::new(call), completion))
}

/// What commands operate on.
pub struct CommandContext<'a> {
    pub state: &'a SharedState,
    pub map: &'a AddressSpace,
}
