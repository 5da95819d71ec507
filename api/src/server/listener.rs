//! The listening socket and its file.

use std::{
    fs::{self, File},
    io,
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::PathBuf,
};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::{ServerError, Settings};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Listens; removes its file when dropped.
#[derive(Debug)]
pub struct Listener {
    pub socket: UnixListener,
    path: PathBuf,
    /// Device and inode, so that no other file is removed.
    file: (u64, u64),
    allow_uids: Vec<u32>,
    /// Closed to refuse a client when there are no more descriptors.
    spare: Option<File>,
}

/// The process that has connected.
#[derive(Debug)]
pub struct Peer {
    /// Its name in messages.
    pub name: String,
    /// Whether it may use the socket.
    pub allowed: bool,
    /// Whether it is the server's own user or root.
    pub own: bool,
}

impl Listener {
    pub fn bind(settings: &Settings) -> Result<Self, ServerError> {
        let path = &settings.path;
        let host = |action| {
            move |source: io::Error| ServerError::Host {
                path: path.clone(),
                action,
                source,
            }
        };
        remove_stale(settings)?;
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(|error| host("make a socket")(error.into()))?;
        let address =
            SocketAddrUnix::new(path).map_err(|error| host("use the path")(error.into()))?;
        rustix::net::bind(&socket, &address)
            .map_err(|error| host("make the socket's file")(error.into()))?;
        // Clients can connect only after listen(), so the mode is set before the first one.
        let mode = if settings.allow_uids.is_empty() {
            0o600
        } else {
            0o666
        };
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .map_err(host("set the socket's mode"))?;
        let metadata = fs::symlink_metadata(path).map_err(host("look at the socket's file"))?;
        rustix::net::listen(&socket, BACKLOG).map_err(|error| host("listen")(error.into()))?;
        Ok(Self {
            socket: socket.into(),
            path: path.clone(),
            file: (metadata.dev(), metadata.ino()),
            allow_uids: settings.allow_uids.clone(),
            spare: spare(),
        })
    }

    /// The next connection, and its peer.
    pub fn accept(&self) -> io::Result<(UnixStream, Peer)> {
        let (stream, _) = self.socket.accept()?;
        stream.set_nonblocking(true)?;
        let peer = sockopt::socket_peercred(&stream)?;
        let uid = peer.uid.as_raw();
        let own = uid == rustix::process::geteuid().as_raw() || uid == 0;
        let peer = Peer {
            name: format!("process {} of user {uid}", peer.pid.as_raw_nonzero()),
            allowed: own || self.allow_uids.contains(&uid),
            own,
        };
        Ok((stream, peer))
    }

    /// The next connection, when the process has no descriptors left for it, so that it can be refused. Until it is
    /// accepted, the server wakes up for it without end.
    pub fn accept_without_descriptors(&mut self) -> Option<UnixStream> {
        self.spare.take()?;
        self.socket.accept().ok().map(|(stream, _)| stream)
    }

    /// Opens the spare descriptor again, after the refused connection was closed.
    pub fn restore_spare(&mut self) {
        self.spare = self.spare.take().or_else(spare);
    }
}

/// Any descriptor.
fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

/// Removes a socket file on which no process listens.
fn remove_stale(settings: &Settings) -> Result<(), ServerError> {
    let path = &settings.path;
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !metadata.file_type().is_socket() {
        return Err(ServerError::NotASocket(path.clone()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "removed a socket that was left over");
            fs::remove_file(path).map_err(|source| ServerError::Host {
                path: path.clone(),
                action: "remove the socket that was left over",
                source,
            })
        }
        _ => Err(ServerError::InUse(path.clone())),
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.file);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}
