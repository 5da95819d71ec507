//! The host's side of consoles: standard input and output, files and sockets.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
        unix::{
            fs::FileTypeExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use fanlight_api::CharBackend;
use fanlight_devices::legacy::output::{Output, OutputThread};
use thiserror::Error;

use crate::{host::files::open_at_once, host::terminal::RawTerminal};

/// How long a socket's client may leave its buffer full before it is disconnected.
const CLIENT_PATIENCE: Duration = Duration::from_secs(1);

/// Why there is no console.
#[derive(Debug, Error)]
pub enum ConsoleError {
    /// The file cannot be written.
    #[error("{}: cannot write console output to it", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error("{}: cannot listen there; remove it if it is left over, or give another path", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Something of the host's failed.
    #[error("cannot set up a console")]
    Host(#[from] io::Error),
}

/// A console's connection to the host.
pub struct HostConsole {
    /// Where the guest's output goes; never blocks.
    pub output: Output,
    /// Where input comes from.
    pub input: Input,
    _thread: OutputThread,
}

/// Where a console's input comes from.
pub enum Input {
    /// Nowhere.
    None,
    /// Standard input, with the terminal in raw mode if it is one.
    Stdin(Escape, Option<RawTerminal>),
    /// A socket.
    Socket(SocketInput),
}

impl HostConsole {
    /// Opens a backend. `name` names its thread.
    pub fn open(name: &str, backend: &CharBackend) -> Result<Self, ConsoleError> {
        let (sink, input): (Box<dyn Write + Send>, _) = match backend {
            CharBackend::Stdio => (
                Box::new(io::stdout()),
                Input::Stdin(Escape::default(), RawTerminal::enter()?),
            ),
            CharBackend::Null => {
                let socket = SocketInput::without_listener()?;
                (
                    Box::new(SocketSink(socket.client.clone())),
                    Input::Socket(socket),
                )
            }
            CharBackend::File(path) => (Box::new(append_to(path)?), Input::None),
            CharBackend::Socket(path) => {
                let socket = SocketInput::listen(path)?;
                (
                    Box::new(SocketSink(socket.client.clone())),
                    Input::Socket(socket),
                )
            }
        };
        let (output, thread) = Output::spawn(name, sink)?;
        Ok(Self {
            output,
            input,
            _thread: thread,
        })
    }
}

fn append_to(path: &Path) -> Result<File, ConsoleError> {
    let error = |source| ConsoleError::File {
        path: path.into(),
        source,
    };
    let mut how = OpenOptions::new();
    let file = open_at_once(how.append(true).create(true), path).map_err(error)?;
    // Its thread may wait for a slow reader; only the opening could not.
    rustix::io::ioctl_fionbio(&file, false).map_err(|errno| error(errno.into()))?;
    Ok(file)
}

/// What became of a look at the input.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// Bytes for the guest; possibly none.
    Bytes(Vec<u8>),
    /// No more will come.
    End,
    /// The user wants to leave.
    Quit,
}

impl Input {
    /// Descriptors to wait on.
    pub fn fds(&self) -> Vec<RawFd> {
        match self {
            Input::None => vec![],
            Input::Stdin(..) => vec![io::stdin().as_raw_fd()],
            Input::Socket(socket) => vec![socket.fd()],
        }
    }

    /// Connects a client, and gives the client's end. `None` if this is no place for one; an error if one
    /// is there already, or the host fails.
    pub fn attach(&mut self) -> Option<io::Result<UnixStream>> {
        let Input::Socket(socket) = self else {
            return None;
        };
        let pair = UnixStream::pair().and_then(|(ours, theirs)| {
            if socket.take_client(ours) {
                Ok(theirs)
            } else {
                Err(io::ErrorKind::ResourceBusy.into())
            }
        });
        Some(pair)
    }

    /// Columns and rows of the terminal, if the input is one.
    pub fn terminal_size(&self) -> Option<(u16, u16)> {
        let Input::Stdin(_, Some(_)) = self else {
            return None;
        };
        let size = rustix::termios::tcgetwinsize(stdin()).ok()?;
        Some((size.ws_col, size.ws_row))
    }

    /// Takes what is there. Called when the descriptor is readable.
    pub fn receive(&mut self) -> Received {
        let mut bytes = [0; 1024];
        match self {
            Input::None => Received::End,
            Input::Stdin(escape, terminal) => {
                match rustix::io::read(stdin(), &mut bytes) {
                    Ok(0) => Received::End,
                    // Without a terminal the bytes are a program's: none of them is a command.
                    Ok(read) if terminal.is_some() => escape.filter(&bytes[..read]),
                    Ok(read) => Received::Bytes(bytes[..read].into()),
                    Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {
                        Received::Bytes(vec![])
                    }
                    Err(_) => Received::End,
                }
            }
            Input::Socket(socket) => Received::Bytes(socket.receive(&mut bytes)),
        }
    }
}

fn stdin() -> BorrowedFd<'static> {
    rustix::stdio::stdin()
}

/// Recognises Ctrl-A x, which leaves, and Ctrl-A Ctrl-A, which is one Ctrl-A.
#[derive(Debug, Default)]
pub struct Escape {
    armed: bool,
}

const CTRL_A: u8 = 1;

impl Escape {
    /// What of `bytes` is for the guest, or that the user wants to leave.
    pub fn filter(&mut self, bytes: &[u8]) -> Received {
        let mut kept = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            match (std::mem::take(&mut self.armed), byte) {
                (false, CTRL_A) => self.armed = true,
                (true, b'x') => return Received::Quit,
                (true, CTRL_A) | (false, _) => kept.push(byte),
                (true, _) => kept.extend([CTRL_A, byte]),
            }
        }
        Received::Bytes(kept)
    }
}

type Client = Arc<Mutex<Option<UnixStream>>>;

/// A client, one at a time, and the socket that it comes through, if there is one.
pub struct SocketInput {
    listener: Option<(PathBuf, UnixListener)>,
    client: Client,
    /// The listener and the client behind one descriptor, so that the main loop knows only that.
    epoll: std::os::fd::OwnedFd,
}

impl SocketInput {
    fn listen(path: &Path) -> Result<Self, ConsoleError> {
        use rustix::event::epoll;
        let error = |source| ConsoleError::Socket {
            path: path.into(),
            source,
        };
        // Left over from a process that is gone: nobody answers.
        let stale = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
            && UnixStream::connect(path)
                .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
        if stale {
            std::fs::remove_file(path).map_err(error)?;
        }
        let listener = UnixListener::bind(path).map_err(error)?;
        listener.set_nonblocking(true).map_err(error)?;
        let mut input = Self::without_listener().map_err(error)?;
        epoll::add(
            &input.epoll,
            &listener,
            epoll::EventData::new_u64(0),
            epoll::EventFlags::IN,
        )
        .map_err(|e| error(e.into()))?;
        input.listener = Some((path.into(), listener));
        Ok(input)
    }

    /// Clients come by [`Input::attach`] only.
    fn without_listener() -> io::Result<Self> {
        use rustix::event::epoll;
        Ok(Self {
            listener: None,
            client: Arc::default(),
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
        })
    }

    fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    fn receive(&mut self, bytes: &mut [u8]) -> Vec<u8> {
        if let Some((_, listener)) = &self.listener
            && let Ok((stream, _)) = listener.accept()
        {
            self.take_client(stream);
        }
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(stream) = client.as_mut() else {
            return vec![];
        };
        match rustix::net::recv(&*stream, &mut *bytes, rustix::net::RecvFlags::DONTWAIT) {
            Ok((0, _)) => {
                *client = None;
                vec![]
            }
            Ok((read, _)) => bytes[..read].into(),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => vec![],
            Err(_) => {
                *client = None;
                vec![]
            }
        }
    }

    /// Whether the console was free. A second client is told by a closed connection that it is taken.
    fn take_client(&self, stream: UnixStream) -> bool {
        use rustix::event::epoll;
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        // One that has gone may not have been read to its end, where the guest takes no input.
        if client.as_ref().is_some_and(has_gone) {
            *client = None;
        }
        let registered = client.is_none()
            && stream.set_write_timeout(Some(CLIENT_PATIENCE)).is_ok()
            && epoll::add(
                &self.epoll,
                stream.as_fd(),
                epoll::EventData::new_u64(1),
                epoll::EventFlags::IN,
            )
            .is_ok();
        if registered {
            *client = Some(stream);
        }
        registered
    }
}

/// Whether the other end is closed.
fn has_gone(stream: &UnixStream) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&at_once)).is_ok() && fds[0].revents().contains(PollFlags::HUP)
}

impl Drop for SocketInput {
    fn drop(&mut self) {
        if let Some((path, _)) = &self.listener {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Writes to the client, if there is one.
struct SocketSink(Client);

impl Write for SocketSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stream = {
            let client = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            client.as_ref().map(UnixStream::try_clone).transpose()?
        };
        if let Some(mut stream) = stream
            && stream.write_all(bytes).is_err()
        {
            tracing::warn!("the console's client does not read: disconnected");
            // The main loop sees the end of the stream and forgets the client.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn ctrl_a_x_quits_across_reads() {
        let mut escape = Escape::default();
        assert_eq!(escape.filter(b"ab\x01"), Received::Bytes(b"ab".into()));
        assert_eq!(escape.filter(b"\x01c"), Received::Bytes(b"\x01c".into()));
        assert_eq!(escape.filter(b"\x01d"), Received::Bytes(b"\x01d".into()));
        assert_eq!(escape.filter(b"\x01"), Received::Bytes(vec![]));
        assert_eq!(escape.filter(b"x"), Received::Quit);
    }

    #[test]
    fn a_socket_serves_one_client_after_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let mut console = HostConsole::open("test", &CharBackend::Socket(path.clone())).unwrap();
        for _ in 0..2 {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(b"in").unwrap();
            assert_eq!(console.input.receive(), Received::Bytes(b"in".into()));
            console.output.write_all(b"out").unwrap();
            let mut bytes = [0; 3];
            client.read_exact(&mut bytes).unwrap();
            assert_eq!(&bytes, b"out");
            drop(client);
            assert_eq!(console.input.receive(), Received::Bytes(vec![]));
        }
        drop(console);
        assert!(!path.exists());
    }

    #[test]
    fn a_console_without_a_place_can_be_attached_to() {
        let mut console = HostConsole::open("test", &CharBackend::Null).unwrap();
        console.output.write_all(b"lost").unwrap();
        let mut client = console.input.attach().unwrap().unwrap();
        assert!(console.input.attach().unwrap().is_err());
        client.write_all(b"in").unwrap();
        assert_eq!(console.input.receive(), Received::Bytes(b"in".into()));
        drop(client);
        assert_eq!(console.input.receive(), Received::Bytes(vec![]));
        let mut client = console.input.attach().unwrap().unwrap();
        // One that has gone holds the place for nobody, though what it typed was not taken.
        client.write_all(b"lost").unwrap();
        drop(client);
        assert!(console.input.attach().unwrap().is_ok());
    }

    #[test]
    fn a_left_over_socket_is_replaced_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        drop(UnixListener::bind(&path).unwrap());
        assert!(HostConsole::open("test", &CharBackend::Socket(path.clone())).is_ok());
        std::fs::write(&path, "").unwrap();
        assert!(HostConsole::open("test", &CharBackend::Socket(path)).is_err());
    }
}
