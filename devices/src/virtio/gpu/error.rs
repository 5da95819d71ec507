//! Why a command of the driver is refused, and the response that says so.

use std::io;

use thiserror::Error;

use super::protocol::*;
use crate::{
    dmabuf::{BufferError, ScatterError},
    memory::ArenaError,
};

/// Why a command is refused.
#[derive(Debug, Error)]
pub enum CommandError {
    /// The request holds less than the command.
    #[error("the command ends early")]
    Truncated,
    /// No such command, or none without a feature that was not negotiated.
    #[error("no such command: {0:#x}")]
    Unknown(u32),
    /// No such output.
    #[error("no such scanout: {0}")]
    Scanout(u32),
    /// No such resource, or one too many of this id.
    #[error("resource {0} is not there, or there already, or of another kind")]
    Resource(u32),
    /// A value that makes no sense.
    #[error("bad {0}")]
    Parameter(&'static str),
    /// Entries that are not memory.
    #[error(transparent)]
    Memory(#[from] ScatterError),
    /// Memory is attached twice, or detached or used without being there.
    #[error("the resource's memory {0}")]
    Backing(&'static str),
    /// The guest has as much of the host's memory as it may.
    #[error("{0} more bytes pass max-resource-memory, or there are too many resources")]
    OutOfMemory(u64),
    /// The host failed.
    #[error("the host has no memory for it")]
    Host(#[source] io::Error),
    /// The host cannot read what it should.
    #[error(transparent)]
    Buffer(#[from] BufferError),
    /// No such context, or one of this id already, or one too many.
    #[error("context {0} is not there, or there already, or there are too many")]
    Context(u32),
    /// A blob cannot be shown.
    #[error("cannot show the blob")]
    Map(#[source] ArenaError),
    /// The renderer has ended, and takes no more until the driver resets the device.
    #[error("the renderer has ended")]
    NoRenderer,
    /// The renderer refused the command.
    #[error("the renderer refused it")]
    Renderer,
    /// The renderer has no descriptor left.
    #[error(
        "the renderer has no descriptor left for a blob: raise the limit on open files (ulimit -Hn) that Fanlight \
         is started with"
    )]
    RendererFiles,
}

impl CommandError {
    /// Whether a limit of the host is the cause, which its owner can raise.
    pub fn is_of_host(&self) -> bool {
        match self {
            Self::Host(_) | Self::RendererFiles => true,
            // A lost arena stops the process, so this answer is never read.
            Self::Map(error) => error.is_of_host(),
            Self::Truncated
            | Self::Unknown(_)
            | Self::Scanout(_)
            | Self::Resource(_)
            | Self::Parameter(_)
            | Self::Memory(_)
            | Self::Backing(_)
            | Self::OutOfMemory(_)
            | Self::Buffer(_)
            | Self::Context(_)
            | Self::NoRenderer
            | Self::Renderer => false,
        }
    }

    /// The error of the specification (5.7.6.7).
    pub fn response(&self) -> u32 {
        match self {
            Self::Truncated | Self::Parameter(_) | Self::Memory(_) => {
                VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER
            }
            Self::Unknown(_)
            | Self::Backing(_)
            | Self::Buffer(_)
            | Self::NoRenderer
            | Self::Renderer => VIRTIO_GPU_RESP_ERR_UNSPEC,
            Self::Context(_) => VIRTIO_GPU_RESP_ERR_INVALID_CONTEXT_ID,
            Self::Map(error) if error.is_of_host() => VIRTIO_GPU_RESP_ERR_OUT_OF_MEMORY,
            Self::Map(_) => VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER,
            Self::Scanout(_) => VIRTIO_GPU_RESP_ERR_INVALID_SCANOUT_ID,
            Self::Resource(_) => VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID,
            Self::OutOfMemory(_) | Self::Host(_) | Self::RendererFiles => {
                VIRTIO_GPU_RESP_ERR_OUT_OF_MEMORY
            }
        }
    }
}
