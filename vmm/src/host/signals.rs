//! Signals as bytes in sockets, on which a loop can wait.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

/// Signals that arrived.
#[derive(Debug, Default)]
pub struct Caught {
    /// How often the process was asked to end.
    pub terminate: usize,
    /// Whether the terminal was resized.
    pub resized: bool,
}

/// Signals as bytes in sockets.
pub struct Signals {
    terminate: UnixStream,
    resized: UnixStream,
    /// Both behind one descriptor.
    epoll: OwnedFd,
}

/// Readable when a signal has come.
impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl Signals {
    /// Catches signals from now on. Once in a process.
    pub fn catch() -> io::Result<Self> {
        use rustix::event::epoll;
        let pipe = |numbers: &[i32]| {
            let (read, write) = UnixStream::pair()?;
            read.set_nonblocking(true)?;
            for &number in numbers {
                signal_hook::low_level::pipe::register(number, write.try_clone()?)?;
            }
            io::Result::Ok(read)
        };
        let terminate = pipe(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP])?;
        let resized = pipe(&[libc::SIGWINCH])?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for socket in [&terminate, &resized] {
            let data = epoll::EventData::new_u64(0);
            epoll::add(&epoll, socket, data, epoll::EventFlags::IN)?;
        }
        Ok(Self {
            terminate,
            resized,
            epoll,
        })
    }

    /// Whether the process is asked to end.
    pub fn ask_to_end(&self) -> bool {
        self.take().terminate > 0
    }

    /// The signals since the last call.
    pub fn take(&self) -> Caught {
        use std::io::Read;
        let mut bytes = [0; 64];
        let terminate = (&self.terminate).read(&mut bytes).unwrap_or(0);
        let resized = (&self.resized).read(&mut bytes).unwrap_or(0);
        Caught {
            terminate,
            resized: resized > 0,
        }
    }
}
