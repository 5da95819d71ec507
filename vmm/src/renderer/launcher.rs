//! Starts renderers and ends them.

use std::{
    fmt,
    fs::File,
    io,
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    sync::Arc,
};

use fanlight_devices::{
    sync::Mutex,
    virtio::gpu::render::{
        Connection, StartRenderer,
        wire::{CapsetInfo, REPLY_FAILED, REPLY_READY, REQUEST_START, Reply, Request, Start},
    },
};
use rustix::{
    net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair},
    process::{Pid, Signal, kill_process_group},
};
use thiserror::Error;
use zerocopy::FromBytes;

/// The hidden subcommand that runs [`process::run`](super::process::run).
pub const COMMAND: &str = "renderer";

/// Why there is no renderer.
#[derive(Debug, Error)]
pub enum RendererError {
    /// Its process cannot be started.
    #[error("cannot start a renderer")]
    Start(#[from] io::Error),
    /// It cannot work, for this reason.
    #[error("{0}")]
    Failed(String),
    /// It ended before its first reply.
    #[error("the renderer ended at once: virglrenderer does not work on this host")]
    Ended,
}

/// Starts renderers for one guest.
pub struct RendererLauncher {
    ram: Arc<File>,
    start: Start,
    /// A renderer that was only asked for its capability sets.
    unused: Mutex<Option<Connection>>,
}

impl fmt::Debug for RendererLauncher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RendererLauncher")
            .field("start", &self.start)
            .finish_non_exhaustive()
    }
}

impl RendererLauncher {
    /// Renderers for a guest whose memory is the memfd `ram`.
    pub fn new(ram: Arc<File>, start: Start) -> Self {
        Self {
            ram,
            start,
            unused: Mutex::new(None),
        }
    }

    /// The capability sets of renderers: starts one, waits until it is ready, and keeps it for the next
    /// [`StartRenderer::start`].
    pub fn capabilities(&self) -> Result<Vec<CapsetInfo>, RendererError> {
        let connection = self.start()?;
        let reply = Reply::receive(&connection.socket, RecvFlags::empty())?;
        let reply = reply.ok_or(RendererError::Ended)?;
        let infos = match reply.head.what {
            REPLY_READY => <[CapsetInfo]>::ref_from_bytes(&reply.data)
                .map_err(|_| RendererError::Ended)?
                .to_vec(),
            REPLY_FAILED => {
                let why = String::from_utf8_lossy(&reply.data).into_owned();
                return Err(RendererError::Failed(why));
            }
            _ => return Err(RendererError::Ended),
        };
        *self.unused.lock() = Some(connection);
        Ok(infos)
    }
}

impl StartRenderer for RendererLauncher {
    fn start(&self) -> io::Result<Connection> {
        if let Some(unused) = self.unused.lock().take() {
            return Ok(unused);
        }
        let (socket, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let mut request = Request::new(REQUEST_START, 0, &self.start);
        request.file = Some(self.ram.try_clone()?);
        request.send(&socket)?;
        // In a process group of its own: the render server joins it, and the terminal's signals do not reach it.
        let child = Command::new("/proc/self/exe")
            .arg(COMMAND)
            // The sandbox lets it write no cache.
            .env("MESA_SHADER_CACHE_DISABLE", "true")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()?;
        Ok(Connection {
            socket,
            process: Box::new(Process(child)),
        })
    }
}

/// A renderer's process. Dropping it ends the renderer with all that it started.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = kill_process_group(Pid::from_child(&self.0), Signal::KILL) {
            tracing::error!(%error, "cannot end the renderer");
            return;
        }
        let _ = self.0.wait();
    }
}
