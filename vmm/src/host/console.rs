//! Backends of consoles: standard input and output, files and sockets.

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
    sync::Arc,
    time::Duration,
};

use fanlight_api::CharBackend;
use fanlight_devices::{
    legacy::output::{Output, OutputThread},
    sync::Mutex,
};
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
    /// The host failed.
    #[error("cannot set up a console")]
    Host(#[from] io::Error),
}

/// The backend of a console.
pub struct HostConsole {
    /// Takes the guest's output; never blocks.
    pub output: Output,
    /// The source of input.
    pub input: Input,
    _thread: OutputThread,
}

/// The source of a console's input.
pub enum Input {
    /// None.
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

/// The result of [`Input::receive`].
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// Bytes for the guest; possibly none.
    Bytes(Vec<u8>),
    /// The input has ended.
    End,
    /// The user typed Ctrl-A x.
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

    /// Connects a client, and returns the client's end. `None` if the backend takes no clients; an error if it has
    /// one already (`ResourceBusy`), or the host fails.
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

    /// Reads what has arrived. Called when a descriptor is readable.
    pub fn receive(&mut self) -> Received {
        let mut bytes = [0; 1024];
        match self {
            Input::None => Received::End,
            Input::Stdin(escape, terminal) => {
                match rustix::io::read(stdin(), &mut bytes) {
                    Ok(0) => Received::End,
                    // Without a terminal the bytes come from a program, and Ctrl-A is data.
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

/// Recognises Ctrl-A x, which quits, and Ctrl-A Ctrl-A, which sends one Ctrl-A.
#[derive(Debug, Default)]
pub struct Escape {
    armed: bool,
}

const CTRL_A: u8 = 1;

impl Escape {
    /// The part of `bytes` for the guest, or that the user quits.
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

/// One client at a time, through a listening socket or [`Input::attach`].
pub struct SocketInput {
    listener: Option<(PathBuf, UnixListener)>,
    client: Client,
    /// The listener and the client behind one descriptor for the main loop.
    epoll: std::os::fd::OwnedFd,
}

impl SocketInput {
    fn listen(path: &Path) -> Result<Self, ConsoleError> {
        use rustix::event::epoll;
        let error = |source| ConsoleError::Socket {
            path: path.into(),
            source,
        };
        // A socket file that no process listens on is left over.
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

    /// Clients come through [`Input::attach`] only.
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
        let mut client = self.client.lock();
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

    /// Takes a client if there is none. Otherwise its connection closes. Returns whether it was taken.
    fn take_client(&self, stream: UnixStream) -> bool {
        use rustix::event::epoll;
        let mut client = self.client.lock();
        // A client that has gone may have unread input, if the guest takes none.
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
            let client = self.0.lock();
            client.as_ref().map(UnixStream::try_clone).transpose()?
        };
        if let Some(mut stream) = stream
            && stream.write_all(bytes).is_err()
        {
            tracing::warn!("the console's client does not read: disconnected");
            // The main loop reads the end of the stream and drops the client.
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
        // A client that has gone does not block the next, though its input was not read.
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
