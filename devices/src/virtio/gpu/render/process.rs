//! How the device gets a renderer: a process that somebody else starts.

use std::{fmt, io, os::fd::OwnedFd, sync::Arc};

use super::{host_memory::HostMemory, wire::CapsetInfo};

/// A renderer that was started. It need not be ready.
pub struct Connection {
    /// Packets of [`super::wire`].
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
