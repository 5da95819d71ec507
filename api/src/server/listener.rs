//! The listening socket and its file.

use std::{
    fs, io,
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
    /// Device and inode, so that nobody else's file is removed.
    file: (u64, u64),
    allow_uids: Vec<u32>,
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
        // Nobody can connect before it listens, so the mode is right before the first may.
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
        })
    }

    /// The next connection, and the name of its peer, if it may be here.
    pub fn accept(&self) -> io::Result<(UnixStream, String, bool)> {
        let (stream, _) = self.socket.accept()?;
        stream.set_nonblocking(true)?;
        let peer = sockopt::socket_peercred(&stream)?;
        let uid = peer.uid.as_raw();
        let allowed = uid == rustix::process::geteuid().as_raw()
            || uid == 0
            || self.allow_uids.contains(&uid);
        let name = format!("process {} of user {uid}", peer.pid.as_raw_nonzero());
        Ok((stream, name, allowed))
    }
}

/// Removes a socket to which nobody listens.
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
