//! A client: one connection, one request at a time. Events are kept until they are taken.

use std::{
    collections::VecDeque,
    io,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};
use thiserror::Error;

use crate::{
    error::ApiError,
    message::{Id, line},
    methods::Method,
    socket::{LineReader, Progress, send},
    types::Event,
};

/// Why a call has no result.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The socket.
    #[error("cannot {action}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The server closed the connection.
    #[error("the server closed the connection")]
    Closed,
    /// The server sent something other than an answer.
    #[error("the server's answer cannot be read")]
    Answer(#[from] serde_json::Error),
    /// The server refused.
    #[error(transparent)]
    Refused(#[from] ApiError),
}

impl ClientError {
    /// Whether the server has closed its end.
    fn is_closed(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionReset};
        matches!(self, Self::Io { source, .. } if matches!(source.kind(), BrokenPipe | ConnectionReset))
    }
}

/// A message from a server: an answer or a notification.
#[derive(Deserialize)]
struct Message {
    id: Option<Id>,
    method: Option<String>,
    params: Option<Event>,
    result: Option<Box<RawValue>>,
    error: Option<ApiError>,
}

/// A connection to a server.
#[derive(Debug)]
pub struct Client {
    socket: UnixStream,
    reader: LineReader,
    events: VecDeque<Event>,
    next_id: u64,
}

impl Client {
    /// Connects to the socket at `path`.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let socket = UnixStream::connect(path).map_err(io_error("connect"))?;
        Ok(Self {
            socket,
            reader: LineReader::default(),
            events: VecDeque::new(),
            next_id: 1,
        })
    }

    /// Calls a method.
    pub fn call<M: Method>(&mut self, params: &M::Params) -> Result<M::Result, ClientError> {
        self.call_with::<M>(params, &[]).map(|(result, _)| result)
    }

    /// Calls a method with descriptors; the result, and the descriptors that came with it.
    pub fn call_with<M: Method>(
        &mut self,
        params: &M::Params,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(M::Result, Vec<OwnedFd>), ClientError> {
        let params = serde_json::to_value(params)?;
        let (result, fds) = self.call_json(M::NAME, &params, fds)?;
        Ok((serde_json::from_value(result)?, fds))
    }

    /// Calls a method by name.
    pub fn call_json(
        &mut self,
        method: &str,
        params: &Value,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Value, Vec<OwnedFd>), ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let request = json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params});
        match self.write(&line(&request), fds) {
            Ok(()) => self.answer(id),
            Err(error) if error.is_closed() => match self.answer(id) {
                // A server that closes at once sends the reason first, if it can.
                Err(ClientError::Refused(why)) => Err(why.into()),
                _ => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    /// The answer to request `id`, with its descriptors.
    fn answer(&mut self, id: u64) -> Result<(Value, Vec<OwnedFd>), ClientError> {
        loop {
            let (message, fds) = self.message()?;
            match message.id {
                Some(Id::Number(number)) if number.as_u64() == Some(id) => {}
                // An error without an id is about this client, or about a line that could not be read.
                None | Some(Id::Null) if message.error.is_some() => {}
                _ => continue,
            }
            if let Some(error) = message.error {
                return Err(error.into());
            }
            let result = match message.result {
                Some(result) => serde_json::from_str(result.get())?,
                None => Value::Null,
            };
            return Ok((result, fds));
        }
    }

    /// The next event of a subscription; waits for it.
    pub fn next_event(&mut self) -> Result<Event, ClientError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            self.message()?;
        }
    }

    /// The next answer; events before it are kept.
    fn message(&mut self) -> Result<(Message, Vec<OwnedFd>), ClientError> {
        let (line, fds) = self.read_line()?;
        let mut message: Message = serde_json::from_slice(&line)?;
        if message.method.as_deref() == Some("event") {
            self.events.extend(message.params.take());
        }
        Ok((message, fds))
    }

    fn write(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        let mut sent = send(&self.socket, bytes, fds).map_err(io_error("send"))?;
        while sent < bytes.len() {
            sent += send(&self.socket, &bytes[sent..], &[]).map_err(io_error("send"))?;
        }
        Ok(())
    }

    /// The next line with its descriptors.
    pub fn read_line(&mut self) -> Result<(Vec<u8>, Vec<OwnedFd>), ClientError> {
        loop {
            if let Some((line, fds)) = self.reader.next_line() {
                return Ok((line.to_vec(), fds));
            }
            match self.reader.receive(&self.socket) {
                Ok(Progress::More) => {}
                Ok(Progress::End | Progress::TooManyFds) => return Err(ClientError::Closed),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(io_error("receive")(error)),
            }
        }
    }

    /// The connection, for uses that this type does not offer.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }
}

fn io_error(action: &'static str) -> impl FnOnce(io::Error) -> ClientError {
    move |source| ClientError::Io { action, source }
}
