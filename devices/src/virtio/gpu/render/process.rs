//! How the device gets a renderer: the machine starts the process.

use std::{fmt, io, os::fd::OwnedFd, sync::Arc};

use super::{host_memory::HostMemory, wire::CapsetInfo};

/// A renderer that was started. It may not be ready yet.
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
    /// Starts renderers.
    pub starter: Arc<dyn StartRenderer>,
    /// Their capability sets.
    pub capsets: Vec<CapsetInfo>,
    /// The region in which blobs are mapped.
    pub memory: Arc<HostMemory>,
}
