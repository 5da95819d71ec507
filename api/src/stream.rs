//! A stream of messages with descriptors, in both directions. Nothing here blocks, so that one thread can wait for
//! other things too.

use std::{
    collections::VecDeque,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;

use crate::{
    message::line,
    socket::{LineReader, Progress, send},
};

/// The longest line that is taken.
const MAX_LINE: usize = 1 << 20;

/// Why a stream ends.
#[derive(Debug, Error)]
pub enum StreamError {
    /// The other end closed it.
    #[error("the other end closed the stream")]
    Closed,
    /// A line is not a message.
    #[error("a line of the stream is not a message")]
    Message(#[from] serde_json::Error),
    /// A line is too long, or has too many descriptors.
    #[error("a line of the stream has more than {MAX_LINE} bytes or too many descriptors")]
    TooLarge,
    /// The socket failed.
    #[error("the stream broke")]
    Io(#[from] io::Error),
}

/// One end of a stream.
#[derive(Debug)]
pub struct MessageStream {
    socket: UnixStream,
    reader: LineReader,
    out: VecDeque<Outgoing>,
}

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

impl MessageStream {
    /// Wraps a connected socket.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            reader: LineReader::default(),
            out: VecDeque::new(),
        })
    }

    /// Whether messages wait for the socket. Callers that send without checking queue without bound.
    pub fn is_full(&self) -> bool {
        !self.out.is_empty()
    }

    /// Sends a message, or queues it.
    pub fn send(&mut self, message: &impl Serialize, fds: Vec<OwnedFd>) -> Result<(), StreamError> {
        self.out.push_back(Outgoing {
            bytes: line(message),
            sent: 0,
            fds,
        });
        self.flush()
    }

    /// Sends what is queued, as far as the socket takes it.
    pub fn flush(&mut self) -> Result<(), StreamError> {
        while let Some(message) = self.out.front_mut() {
            let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
            match send(&self.socket, &message.bytes[message.sent..], &fds) {
                Ok(sent) => {
                    message.sent += sent;
                    // Descriptors were sent with the first byte.
                    message.fds.clear();
                    if message.sent == message.bytes.len() {
                        self.out.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    return Err(StreamError::Closed);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Reads once, and returns the complete messages.
    pub fn receive<T: DeserializeOwned>(&mut self) -> Result<Vec<(T, Vec<OwnedFd>)>, StreamError> {
        match self.reader.receive(&self.socket) {
            Ok(Progress::More) => {}
            Ok(Progress::End) => return Err(StreamError::Closed),
            Ok(Progress::TooManyFds) => return Err(StreamError::TooLarge),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                return Err(StreamError::Closed);
            }
            Err(error) => return Err(error.into()),
        }
        let mut messages = Vec::new();
        while let Some((line, fds)) = self.reader.next_line() {
            messages.push((serde_json::from_slice(line)?, fds));
        }
        if self.reader.unfinished() > MAX_LINE {
            return Err(StreamError::TooLarge);
        }
        Ok(messages)
    }
}

impl AsFd for MessageStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_in_order() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (
            MessageStream::new(a).unwrap(),
            MessageStream::new(b).unwrap(),
        );
        assert!(b.receive::<u32>().unwrap().is_empty());
        a.send(&1u32, vec![]).unwrap();
        a.send(&2u32, vec![tempfile::tempfile().unwrap().into()])
            .unwrap();
        let mut got = Vec::new();
        while got.len() < 2 {
            let messages = b.receive::<u32>().unwrap();
            got.extend(
                messages
                    .into_iter()
                    .map(|(number, fds)| (number, fds.len())),
            );
        }
        assert_eq!(got, [(1, 0), (2, 1)]);
        drop(a);
        assert!(matches!(b.receive::<u32>(), Err(StreamError::Closed)));
    }

    #[test]
    fn a_peer_that_does_not_read_fills_the_stream_and_blocks_nobody() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut a = MessageStream::new(a).unwrap();
        let text = "x".repeat(1 << 16);
        for _ in 0..100 {
            if a.is_full() {
                break;
            }
            a.send(&text, vec![]).unwrap();
        }
        assert!(a.is_full());
        drop(b);
        assert!(a.flush().is_err());
    }

    #[test]
    fn nonsense_ends_the_stream() {
        let (mut a, b) = UnixStream::pair().unwrap();
        let mut b = MessageStream::new(b).unwrap();
        std::io::Write::write_all(&mut a, b"{]\n").unwrap();
        assert!(matches!(b.receive::<u32>(), Err(StreamError::Message(_))));
        let (mut a, b) = UnixStream::pair().unwrap();
        let mut b = MessageStream::new(b).unwrap();
        let writer = std::thread::spawn(move || {
            let _ = std::io::Write::write_all(&mut a, &vec![b'x'; MAX_LINE + 2]);
        });
        loop {
            match b.receive::<u32>() {
                Ok(_) => std::thread::yield_now(),
                Err(error) => break assert!(matches!(error, StreamError::TooLarge)),
            }
        }
        drop(b);
        writer.join().unwrap();
    }
}
