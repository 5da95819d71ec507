//! What becomes of a command: done at once, or once the renderer has replied.

use super::{
    super::{
        error::CommandError, protocol::*, resource::HostKind, response::Response,
        state::SharedState,
    },
    wire::{Call, FenceAt, Say},
};
use crate::{memory::AddressSpace, virtio::queue::Buffers};

/// What comes after the renderer's answer.
#[derive(Debug)]
pub enum Then {
    /// That is all.
    Answer,
    /// An answer that was there before.
    Give(Response),
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
pub enum Outcome {
    /// It is done.
    Now(Response),
    /// It is the renderer's.
    Later(Box<Call>, Then),
    /// It is done, and the renderer is told.
    Told(Box<Call>, Response),
}

impl From<Response> for Outcome {
    fn from(answer: Response) -> Self {
        Self::Now(answer)
    }
}

/// A request of the driver's that the device has taken.
#[derive(Debug)]
pub struct Pending {
    pub head: u16,
    pub writable: Buffers,
    /// The header of its answer, but for the type.
    pub header: CtrlHdr,
    /// Where in the order of fences it is.
    pub fence: FenceAt,
}

/// What the renderer said that concerns the driver.
#[derive(Debug)]
pub enum Heard {
    /// A request is done.
    Done(Pending, Then, Result<Say, CommandError>),
    /// Requests whose answers are written can go back: head and length of each.
    Passed(Vec<(u16, u32)>),
    /// The renderer is no more: what it was asked for last, and all that waited for a fence.
    Died(
        Option<(Pending, Result<Response, CommandError>)>,
        Vec<(u16, u32)>,
    ),
}

/// Has the renderer asked, and the command finished by `then`.
pub fn later(call: Call, then: Then) -> Result<Outcome, CommandError> {
    Ok(Outcome::Later(Box::new(call), then))
}

/// What commands are looked up in.
pub struct CommandContext<'a> {
    pub state: &'a SharedState,
    pub map: &'a AddressSpace,
}
