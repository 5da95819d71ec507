//! The server: transport and policy. Its [`Handler`] answers the methods.
//!
//! One thread serves all clients. A client that sends half a line, floods, stops reading or dies does not disturb the
//! others. Each client's state is bounded; a client that exceeds a bound is disconnected.

mod clients;
mod connection;
mod events;
mod listener;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use thiserror::Error;

use crate::{
    methods::{DisplayCall, MachineCall, StatusCall},
    socket::Descriptors,
};

pub use connection::Reply;
pub use events::Events;

use clients::Clients;
use connection::Wake;
use listener::Listener;

/// The longest line that a client may send, its end included.
pub const MAX_LINE: usize = 1 << 20;
/// Bytes that the server keeps for a client that does not read its answers.
pub const MAX_OUTPUT: usize = 4 << 20;
/// Descriptors that the server keeps for it: a client that does not read must not exhaust those of the process.
pub const MAX_OUTPUT_FDS: usize = 32;
/// Bytes of unread output above which events are dropped and counted.
pub const MAX_EVENTS: usize = 256 << 10;
/// Requests of one client that wait for their answers; more are not read before one has come.
pub const MAX_PENDING: usize = 256;
/// Connections at a time.
pub const MAX_CLIENTS: usize = 256;
/// Of those, connections of users whom [`Settings::allow_uids`] lets in: the owner always finds room.
pub const MAX_OTHERS: usize = MAX_CLIENTS / 2;
/// Descriptors that are kept for all clients together. The machine needs the rest.
pub const MAX_HELD_FDS: usize = 256;
/// How long descriptors are kept for an unfinished line.
pub const FDS_PATIENCE: Duration = if cfg!(test) {
    Duration::from_secs(3)
} else {
    Duration::from_secs(10)
};

/// Answers all calls but those of [`ServerCall`](crate::methods::ServerCall).
///
/// Its functions run on the server's thread, which all clients share. Work that takes time goes to another thread,
/// which sends the reply.
pub trait Handler: Send + Sync + 'static {
    /// Answers a call that is possible in every state of the machine.
    fn status(&self, call: StatusCall, reply: Reply);
    /// Answers a call of a display.
    fn display(&self, call: DisplayCall, reply: Reply);
    /// Answers a call for the thread of the machine.
    fn machine(&self, call: MachineCall, descriptors: Descriptors, reply: Reply);
}

/// Where to listen, and for whom.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Path of the socket.
    pub path: PathBuf,
    /// Users that may connect besides the server's own and root. With any, the socket's mode is 0666, and
    /// the peer's credentials alone decide.
    pub allow_uids: Vec<u32>,
}

/// Why there is no server.
#[derive(Debug, Error)]
pub enum ServerError {
    /// Another process listens there.
    #[error("API socket {}: another process serves it; give another path", .0.display())]
    InUse(PathBuf),
    /// The path is not a socket.
    #[error("API socket {}: it exists and is not a socket; give another path", .0.display())]
    NotASocket(PathBuf),
    /// The host refused.
    #[error("API socket {}: cannot {action}", path.display())]
    Host {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A running server. Dropping it sends the remaining answers, for a bounded time, and removes the socket.
#[derive(Debug)]
pub struct Server {
    wake: Arc<Wake>,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
}

impl Server {
    /// Listens, and serves on a thread of its own.
    pub fn start(
        settings: &Settings,
        events: Events,
        handler: Arc<dyn Handler>,
    ) -> Result<Self, ServerError> {
        let host = |action| {
            move |source| ServerError::Host {
                path: settings.path.clone(),
                action,
                source,
            }
        };
        let listener = Listener::bind(settings)?;
        let wake = Arc::new(Wake::new().map_err(host("make an event descriptor"))?);
        let mut clients = Clients::new(listener, wake.clone(), events, handler)
            .map_err(host("wait for events"))?;
        let thread = std::thread::Builder::new()
            .name("api".into())
            .spawn(move || clients.run())
            .map_err(host("start a thread"))?;
        Ok(Self {
            wake,
            thread: Some(thread),
            path: settings.path.clone(),
        })
    }

    /// Path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.wake.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests;
