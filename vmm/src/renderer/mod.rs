//! The renderer: this program again, in a process of its own, with virglrenderer in it. The guest's command
//! streams reach C code only there.

mod library;
pub mod process;
pub mod sandbox;

use std::{
    fmt,
    fs::File,
    io,
    os::{fd::OwnedFd, unix::process::CommandExt},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use fanlight_devices::virtio::gpu::render::{
    Connection, StartRenderer,
    wire::{CapsetInfo, REPLY_FAILED, REPLY_READY, REQUEST_START, Reply, Request, Start},
};
use rustix::{
    net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair},
    process::{Pid, Signal, kill_process_group},
};
use thiserror::Error;
use zerocopy::FromBytes;

/// The hidden subcommand that runs [`process::run`].
pub const COMMAND: &str = "renderer";

/// Why there is no renderer.
#[derive(Debug, Error)]
pub enum RendererError {
    /// It cannot be started.
    #[error("cannot start a renderer")]
    Start(#[from] io::Error),
    /// It says why it cannot work.
    #[error("{0}")]
    Failed(String),
    /// It ended before it said anything.
    #[error("the renderer ended at once: virglrenderer does not work on this host")]
    Ended,
}

/// Starts renderers that draw for a guest.
pub struct Starter {
    ram: Arc<File>,
    start: Start,
    /// One that was asked what it can do, and nothing else.
    fresh: Mutex<Option<Connection>>,
}

impl fmt::Debug for Starter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Starter")
            .field("start", &self.start)
            .finish_non_exhaustive()
    }
}

impl Starter {
    /// For a guest whose memory is `ram`.
    pub fn new(ram: Arc<File>, start: Start) -> Self {
        Self {
            ram,
            start,
            fresh: Mutex::new(None),
        }
    }

    fn fresh(&self) -> MutexGuard<'_, Option<Connection>> {
        self.fresh.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What renderers can do: starts one, waits until it is ready, and keeps it for the first who wants one.
    pub fn capabilities(&self) -> Result<Vec<CapsetInfo>, RendererError> {
        let connection = self.start()?;
        let say = Reply::receive(&connection.socket, RecvFlags::empty())?;
        let say = say.ok_or(RendererError::Ended)?;
        let infos = match say.head.what {
            REPLY_READY => <[CapsetInfo]>::ref_from_bytes(&say.data)
                .map_err(|_| RendererError::Ended)?
                .to_vec(),
            REPLY_FAILED => {
                let why = String::from_utf8_lossy(&say.data).into_owned();
                return Err(RendererError::Failed(why));
            }
            _ => return Err(RendererError::Ended),
        };
        *self.fresh() = Some(connection);
        Ok(infos)
    }
}

impl StartRenderer for Starter {
    fn start(&self) -> io::Result<Connection> {
        if let Some(fresh) = self.fresh().take() {
            return Ok(fresh);
        }
        let (socket, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let mut call = Request::new(REQUEST_START, 0, &self.start);
        call.file = Some(self.ram.try_clone()?);
        call.send(&socket)?;
        // A group of its own: the render server is in it, and the terminal's signals are not for them.
        let child = Command::new("/proc/self/exe")
            .arg(COMMAND)
            // It may not write where other programs would read it.
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

/// Ends with all that it started when dropped.
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

/// A socket that a renderer was started with.
fn standard_input() -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?)
}
