//! The sending half of a client, for other threads: answers and events are queued here.

use std::{
    collections::VecDeque,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::ThreadId,
};

use rustix::event::{EventfdFlags, eventfd};
use serde_json::value::{RawValue, to_raw_value};

use super::{MAX_EVENTS, MAX_OUTPUT, MAX_OUTPUT_FDS};
use crate::{
    error::{ApiError, ErrorKind},
    message::{Id, Response, line},
    methods::Method,
    socket::send,
    types::{Event, EventName},
};

/// Wakes the server's thread.
#[derive(Debug)]
pub struct Wake {
    event: OwnedFd,
    thread: OnceLock<ThreadId>,
    stop: AtomicBool,
    /// Connections with something to send.
    ready: Mutex<Vec<u64>>,
}

impl Wake {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            thread: OnceLock::new(),
            stop: AtomicBool::new(false),
            ready: Mutex::default(),
        })
    }

    /// The calling thread is the server's, which needs no wake-up.
    pub fn bind(&self) {
        let _ = self.thread.set(std::thread::current().id());
    }

    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.signal();
    }

    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn signal(&self) {
        // The descriptor is full only when the thread is about to wake anyway.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    pub fn clear(&self) {
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }

    /// Connections that have had something to send since the last call.
    pub fn take_ready(&self) -> Vec<u64> {
        std::mem::take(&mut *locked(&self.ready))
    }

    fn add(&self, token: u64) {
        locked(&self.ready).push(token);
        if self.thread.get() != Some(&std::thread::current().id()) {
            self.signal();
        }
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// The value of a mutex, whether or not a thread panicked with it.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A line to send, or the rest of one.
#[derive(Debug)]
struct Message {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

#[derive(Debug, Default)]
struct Out {
    queue: VecDeque<Message>,
    bytes: usize,
    /// More would have been queued than is allowed.
    overflow: bool,
    closed: bool,
    /// Requests without an answer.
    pending: usize,
    subscription: Option<Subscription>,
}

#[derive(Debug)]
struct Subscription {
    events: Option<Vec<EventName>>,
    lost: u64,
}

/// The state of a connection after sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutState {
    /// Everything is sent.
    Empty,
    /// The socket takes no more for now.
    Full,
    /// The client does not read, and its queue has overflowed.
    Overflow,
    /// The client reads no more.
    Gone,
    /// The socket failed.
    Failed,
}

/// The sending half of a connection.
#[derive(Debug)]
pub struct Connection {
    out: Mutex<Out>,
    wake: Arc<Wake>,
    token: u64,
}

impl Connection {
    pub fn new(wake: Arc<Wake>, token: u64) -> Arc<Self> {
        Arc::new(Self {
            out: Mutex::default(),
            wake,
            token,
        })
    }

    fn push(&self, out: &mut Out, bytes: Vec<u8>, fds: Vec<OwnedFd>) {
        /// Lines are sent together up to here.
        const TOGETHER: usize = 64 << 10;
        if out.closed {
            return;
        }
        let unread: usize = out.queue.iter().map(|message| message.fds.len()).sum();
        if out.bytes > 0 && out.bytes + bytes.len() > MAX_OUTPUT
            || unread + fds.len() > MAX_OUTPUT_FDS
        {
            out.overflow = true;
        } else {
            out.bytes += bytes.len();
            match out.queue.back_mut() {
                Some(last)
                    if last.fds.is_empty()
                        && fds.is_empty()
                        && last.bytes.len() + bytes.len() <= TOGETHER =>
                {
                    last.bytes.extend(bytes);
                }
                _ => out.queue.push_back(Message {
                    bytes,
                    sent: 0,
                    fds,
                }),
            }
        }
        self.wake.add(self.token);
    }

    /// Queues a line that answers nothing.
    pub fn say(&self, bytes: Vec<u8>) {
        self.push(&mut locked(&self.out), bytes, Vec::new());
    }

    pub fn subscribe(&self, mut events: Option<Vec<EventName>>) {
        if let Some(events) = &mut events {
            // The list may be as long as a line, and is gone through at each event.
            let mut seen = Vec::new();
            events.retain(|name| {
                let first = !seen.contains(name);
                seen.extend(first.then_some(*name));
                first
            });
            events.shrink_to_fit();
        }
        let mut out = locked(&self.out);
        let lost = out.subscription.as_ref().map_or(0, |old| old.lost);
        out.subscription = Some(Subscription { events, lost });
    }

    /// Queues an event, or counts it as lost.
    pub fn event(&self, event: &Event) {
        let mut out = locked(&self.out);
        let behind = out.bytes > MAX_EVENTS;
        let Some(subscription) = &mut out.subscription else {
            return;
        };
        let wanted = |events: &Vec<EventName>| events.contains(&event.event);
        if !subscription.events.as_ref().is_none_or(wanted) {
            return;
        }
        if behind {
            subscription.lost += 1;
            return;
        }
        let params = Event {
            lost: std::mem::take(&mut subscription.lost),
            ..event.clone()
        };
        let text = serde_json::json!({"jsonrpc": "2.0", "method": "event", "params": params});
        self.push(&mut out, line(&text), Vec::new());
    }

    /// Requests without an answer.
    pub fn pending(&self) -> usize {
        locked(&self.out).pending
    }

    /// Whether nothing will ever be sent unless the client asks for it.
    pub fn is_idle(&self) -> bool {
        let out = locked(&self.out);
        out.pending == 0 && out.queue.is_empty() && out.subscription.is_none()
    }

    /// Descriptors that wait to be sent.
    pub fn unsent_fds(&self) -> usize {
        let out = locked(&self.out);
        out.queue.iter().map(|message| message.fds.len()).sum()
    }

    /// Nothing more is queued from now on.
    pub fn close(&self) {
        let mut out = locked(&self.out);
        out.closed = true;
        out.queue.clear();
        out.bytes = 0;
    }

    /// Sends what the socket takes.
    pub fn flush(&self, socket: &UnixStream) -> OutState {
        let mut out = locked(&self.out);
        while let Some(message) = out.queue.front_mut() {
            let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
            match send(socket, &message.bytes[message.sent..], &fds) {
                Ok(sent) => {
                    drop(fds);
                    message.fds.clear();
                    message.sent += sent;
                    if message.sent == message.bytes.len() {
                        out.queue.pop_front();
                    }
                    out.bytes -= sent;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return if out.overflow {
                        OutState::Overflow
                    } else {
                        OutState::Full
                    };
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                    ) =>
                {
                    return OutState::Gone;
                }
                Err(error) => {
                    tracing::warn!(%error, "the API cannot answer a client");
                    return OutState::Failed;
                }
            }
        }
        if out.overflow {
            OutState::Overflow
        } else {
            OutState::Empty
        }
    }
}

/// Answers of a batch, until all have come.
#[derive(Debug)]
pub struct Batch {
    responses: Vec<Response>,
    left: usize,
}

impl Batch {
    pub fn new(requests: usize) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            responses: Vec::new(),
            left: requests,
        }))
    }
}

/// The answer to one request. Sent from any thread; one that is dropped unsent answers with an error.
#[derive(Debug)]
pub struct Reply {
    connection: Arc<Connection>,
    /// None for a notification, which has no answer.
    id: Option<Id>,
    batch: Option<Arc<Mutex<Batch>>>,
    done: bool,
}

impl Reply {
    pub(super) fn new(
        connection: Arc<Connection>,
        id: Option<Id>,
        batch: Option<Arc<Mutex<Batch>>>,
    ) -> Self {
        locked(&connection.out).pending += 1;
        Self {
            connection,
            id,
            batch,
            done: false,
        }
    }

    /// Sends what method `M` gives.
    pub fn send<M: Method>(self, result: Result<M::Result, ApiError>) {
        self.send_with::<M>(result, Vec::new());
    }

    /// The same, with descriptors.
    pub fn send_with<M: Method>(mut self, result: Result<M::Result, ApiError>, fds: Vec<OwnedFd>) {
        let outcome = result.and_then(|result| {
            to_raw_value(&result)
                .map_err(|error| ApiError::new(ErrorKind::Internal, error.to_string()))
        });
        self.finish(outcome, fds);
    }

    /// Sends a result that is JSON already.
    pub(super) fn send_raw(mut self, text: &str) {
        let outcome = RawValue::from_string(text.to_owned())
            .map_err(|error| ApiError::new(ErrorKind::Internal, error.to_string()));
        self.finish(outcome, Vec::new());
    }

    /// Sends an error.
    pub fn refuse(mut self, error: ApiError) {
        self.finish(Err(error), Vec::new());
    }

    /// Whether the client is gone.
    pub fn is_abandoned(&self) -> bool {
        locked(&self.connection.out).closed
    }

    /// The connection, for what goes on after the answer.
    pub(super) fn connection(&self) -> Arc<Connection> {
        self.connection.clone()
    }

    fn finish(&mut self, mut outcome: Result<Box<RawValue>, ApiError>, mut fds: Vec<OwnedFd>) {
        self.done = true;
        if self.batch.is_some() && !fds.is_empty() {
            fds.clear();
            outcome = Err(ApiError::new(
                ErrorKind::BadDescriptor,
                "the answer has a descriptor, which a batch cannot carry: ask in a line of its own",
            ));
        }
        let outcome = outcome.map_err(ApiError::bounded);
        let response = self.id.take().map(|id| Response::new(id, outcome));
        let mut bytes = None;
        match &self.batch {
            None => bytes = response.map(|response| line(&response)),
            Some(batch) => {
                let mut batch = locked(batch);
                batch.left -= 1;
                batch.responses.extend(response);
                if batch.left == 0 && !batch.responses.is_empty() {
                    bytes = Some(line(&batch.responses));
                }
            }
        }
        let mut out = locked(&self.connection.out);
        out.pending -= 1;
        match bytes {
            Some(bytes) => self.connection.push(&mut out, bytes, fds),
            // The client may have waited for room for its requests.
            None => self.connection.wake.add(self.connection.token),
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.done {
            let error = ApiError::new(
                ErrorKind::WrongState,
                "the machine ended before the request was done",
            );
            self.finish(Err(error), Vec::new());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_list_of_events_is_kept_once() {
        let connection = Connection::new(Arc::new(Wake::new().unwrap()), 0);
        let long = [EventName::Panic, EventName::Reset].repeat(100_000);
        connection.subscribe(Some(long));
        let out = locked(&connection.out);
        let kept = out.subscription.as_ref().unwrap().events.clone().unwrap();
        assert_eq!(kept, [EventName::Panic, EventName::Reset]);
    }

    #[test]
    fn descriptors_that_are_not_read_are_bounded() {
        let connection = Connection::new(Arc::new(Wake::new().unwrap()), 0);
        for _ in 0..MAX_OUTPUT_FDS {
            let fd = tempfile::tempfile().unwrap().into();
            connection.push(&mut locked(&connection.out), b"x\n".into(), vec![fd]);
            assert!(!locked(&connection.out).overflow);
        }
        let fd = tempfile::tempfile().unwrap().into();
        connection.push(&mut locked(&connection.out), b"x\n".into(), vec![fd]);
        assert!(locked(&connection.out).overflow);
    }
}
