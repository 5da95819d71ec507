//! Bytes and descriptors over a UNIX stream socket.
//!
//! Descriptors travel with the line that names them. The kernel keeps descriptors with the bytes of their `sendmsg`,
//! and a `recvmsg` ends with the bytes that brought descriptors. So received descriptors belong to the line of the last
//! received byte.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::{
    error::{ApiError, ErrorKind},
    or_fd::OrFd,
};

/// The most descriptors with one line.
pub const MAX_FDS: usize = 16;

/// The result of one read.
struct Received {
    /// Bytes; 0 at the end of the stream.
    len: usize,
    /// Descriptors of the line that contains the last byte.
    fds: Vec<OwnedFd>,
    /// More descriptors came than a line may have; the rest was closed.
    too_many: bool,
}

fn receive(socket: impl AsFd, bytes: &mut [u8]) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let result = recvmsg(
        socket,
        &mut [IoSliceMut::new(bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let fds = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    Ok(Received {
        len: result.bytes,
        fds,
        too_many: result.flags.contains(ReturnFlags::CTRUNC),
    })
}

/// Writes once, with descriptors. Returns how many bytes were written. A closed peer is an error, not a signal.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("more than {MAX_FDS} descriptors with one line"),
        ));
    }
    Ok(sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?)
}

/// Splits a stream into lines with their descriptors.
#[derive(Debug, Default)]
pub struct LineReader {
    input: Vec<u8>,
    /// Where the next line starts in `input`.
    start: usize,
    /// Up to here there is no end of a line.
    scanned: usize,
    /// Bytes of the stream that are no longer in `input`.
    gone: u64,
    /// Descriptors, each with the position in the stream of the byte that it came with.
    fds: VecDeque<(u64, OwnedFd)>,
}

/// The state of the stream after one read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Bytes came.
    More,
    /// The stream has ended.
    End,
    /// A line has more than [`MAX_FDS`] descriptors: the stream cannot be used any more.
    TooManyFds,
}

impl LineReader {
    /// Bytes taken at a time.
    const CHUNK: usize = 64 << 10;

    /// Reads once.
    pub fn receive(&mut self, socket: impl AsFd) -> io::Result<Progress> {
        self.input.drain(..self.start);
        self.gone += self.start as u64;
        self.scanned -= self.start;
        self.start = 0;
        let len = self.input.len();
        self.input.resize(len + Self::CHUNK, 0);
        let result = receive(socket, &mut self.input[len..]);
        self.input
            .truncate(len + result.as_ref().map_or(0, |received| received.len));
        let received = result?;
        let last = self.gone + self.input.len() as u64;
        self.fds
            .extend(received.fds.into_iter().map(|fd| (last, fd)));
        Ok(if received.too_many || self.fds.len() > MAX_FDS {
            Progress::TooManyFds
        } else if received.len == 0 {
            Progress::End
        } else {
            Progress::More
        })
    }

    /// Where the next line ends, if it does.
    fn line_end(&mut self) -> Option<usize> {
        let rest = &self.input[self.scanned..];
        let at = rest.iter().position(|&b| b == b'\n');
        self.scanned += at.unwrap_or(rest.len());
        at.map(|_| self.scanned + 1)
    }

    /// Whether a whole line has arrived.
    pub fn has_line(&mut self) -> bool {
        self.line_end().is_some()
    }

    /// The next whole line, with its end, and its descriptors.
    pub fn next_line(&mut self) -> Option<(&[u8], Vec<OwnedFd>)> {
        let end = self.line_end()?;
        let start = self.start;
        (self.start, self.scanned) = (end, end);
        let mut fds = Vec::new();
        while let Some((at, fd)) = self.fds.pop_front() {
            if at > self.gone + end as u64 {
                self.fds.push_front((at, fd));
                break;
            }
            fds.push(fd);
        }
        Some((&self.input[start..end], fds))
    }

    /// Descriptors of lines that were not taken yet.
    pub fn held_fds(&self) -> usize {
        self.fds.len()
    }

    /// The position in the stream of the byte that the oldest of them came with.
    pub fn oldest_fd(&self) -> Option<u64> {
        self.fds.front().map(|(at, _)| *at)
    }

    /// Bytes of the line that has not ended.
    pub fn unfinished(&self) -> usize {
        self.input.len() - self.start
    }
}

/// The descriptors of one message; `None` once taken.
type MessageFds = Mutex<Vec<Option<OwnedFd>>>;

/// Counts the descriptors of a message that were not taken yet.
#[derive(Clone, Debug)]
pub struct Untaken(Weak<MessageFds>);

impl Untaken {
    /// How many are left; 0 once they cannot be taken any more.
    pub fn count(&self) -> usize {
        self.0.upgrade().map_or(0, |fds| {
            let fds = fds.lock().unwrap_or_else(PoisonError::into_inner);
            fds.iter().flatten().count()
        })
    }
}

/// The source of descriptors that a configuration names by number.
#[derive(Clone, Debug)]
pub enum Descriptors {
    /// The message of a client.
    Message(Arc<MessageFds>),
    /// The process that started this one.
    Inherited,
}

impl Descriptors {
    /// Those of a message.
    pub fn of_message(fds: Vec<OwnedFd>) -> Self {
        Self::Message(Arc::new(Mutex::new(fds.into_iter().map(Some).collect())))
    }

    /// A counter of those that were not taken.
    pub fn untaken(&self) -> Untaken {
        Untaken(match self {
            Self::Message(fds) => Arc::downgrade(fds),
            Self::Inherited => Weak::new(),
        })
    }

    /// The descriptor of this number. One of a message can be taken once.
    pub fn take(&self, number: u32) -> Result<OwnedFd, ApiError> {
        let bad = |text| ApiError::new(ErrorKind::BadDescriptor, text);
        match self {
            Self::Message(fds) => {
                let mut fds = fds.lock().unwrap_or_else(PoisonError::into_inner);
                let count = fds.len();
                let slot = usize::try_from(number).ok().and_then(|at| fds.get_mut(at));
                let slot = slot.ok_or_else(|| {
                    bad(format!(
                        "descriptor {number} did not come with the message, which brought {count}: send \
                         them with the line that names them"
                    ))
                })?;
                slot.take()
                    .ok_or_else(|| bad(format!("descriptor {number} is named twice")))
            }
            Self::Inherited => inherited(number).map_err(|error| {
                bad(format!(
                    "descriptor {number} cannot be used: {error}; it must be open when fanlight starts"
                ))
            }),
        }
    }

    /// The descriptor that `what` names, if it names one.
    pub fn take_of<T>(&self, what: &OrFd<T>) -> Result<Option<OwnedFd>, ApiError> {
        match what {
            OrFd::Named(_) => Ok(None),
            OrFd::Fd(number) => self.take(*number).map(Some),
        }
    }
}

fn inherited(number: u32) -> io::Result<OwnedFd> {
    let number = i32::try_from(number).map_err(io::Error::other)?;
    // SAFETY: the descriptor is borrowed for the length of this call, which only duplicates it; if it is
    // not open that fails.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    fd.try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn descriptors_come_with_the_last_byte() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        send(&a, b"one\n", &[]).unwrap();
        send(&a, b"two\n", &[file.as_fd(), file.as_fd()]).unwrap();
        send(&a, b"three\n", &[]).unwrap();
        // A line in two parts, of which the first brings a descriptor.
        send(&a, b"fo", &[file.as_fd()]).unwrap();
        send(&a, b"ur\nfive\n", &[]).unwrap();
        drop(a);
        let mut reader = LineReader::default();
        let mut lines = Vec::new();
        while reader.receive(&b).unwrap() == Progress::More {
            while let Some((line, fds)) = reader.next_line() {
                lines.push((String::from_utf8_lossy(line).into_owned(), fds.len()));
            }
        }
        let lines: Vec<_> = lines
            .iter()
            .map(|(line, fds)| (line.as_str(), *fds))
            .collect();
        assert_eq!(
            lines,
            [
                ("one\n", 0),
                ("two\n", 2),
                ("three\n", 0),
                ("four\n", 1),
                ("five\n", 0)
            ]
        );
    }

    #[test]
    fn too_many_descriptors_are_told_and_closed() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let mut reader = LineReader::default();
        for _ in 0..MAX_FDS {
            send(&a, b"x", &[file.as_fd()]).unwrap();
            assert_eq!(reader.receive(&b).unwrap(), Progress::More);
        }
        send(&a, b"x", &[file.as_fd()]).unwrap();
        assert_eq!(reader.receive(&b).unwrap(), Progress::TooManyFds);
    }

    #[test]
    fn a_descriptor_can_be_taken_once() {
        let fds = Descriptors::of_message(vec![tempfile::tempfile().unwrap().into()]);
        let untaken = fds.untaken();
        assert_eq!(untaken.count(), 1);
        assert!(fds.take(0).is_ok());
        assert_eq!(untaken.count(), 0);
        assert!(fds.take(0).unwrap_err().message.contains("twice"));
        assert!(fds.take(1).unwrap_err().message.contains("brought 1"));
        assert!(Descriptors::Inherited.take(987_654).is_err());
    }
}
