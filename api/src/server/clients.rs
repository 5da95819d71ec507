//! The server's loop: accepts, reads lines, calls the handler, writes.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::unix::net::UnixStream,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::event::{
    Timespec,
    epoll::{self, CreateFlags, EventData, EventFlags},
};

use super::{
    Events, FDS_PATIENCE, Handler, MAX_CLIENTS, MAX_HELD_FDS, MAX_LINE, MAX_OTHERS, MAX_PENDING,
    Reply,
    connection::{Batch, Connection, OutState, Wake},
    listener::{Listener, Peer},
};
use crate::{
    API_VERSION,
    error::{ApiError, ErrorKind},
    message::{Id, Incoming, Request, Response, line},
    methods::{ApiVersion, Call, EventsSubscribe, ServerCall},
    schema,
    socket::{Descriptors, LineReader, Progress, Untaken},
    types::{Subscribed, Version},
};

/// How long the end waits for clients to take their answers.
const DRAIN: Duration = Duration::from_secs(1);
/// Events taken at a time.
const EVENTS: usize = 64;
/// Lines of one client that are handled in one turn of the loop: then it is the others' turn.
const TURN_LINES: usize = 64;

const LISTENER: u64 = 0;
const WAKE: u64 = 1;
const FIRST_CLIENT: u64 = 2;

/// A client, for the server's thread.
struct Client {
    socket: UnixStream,
    peer: Peer,
    connection: Arc<Connection>,
    reader: LineReader,
    /// The client sends no more; it may still read.
    ended: bool,
    /// The client reads no more. Requests that it has sent are still executed.
    gone: bool,
    /// Lines handled in the loop's turn of this number.
    lines: (u64, usize),
    /// The oldest descriptor that waits for its line to end, by its place in the stream, and since when.
    oldest_fd: Option<(u64, Instant)>,
    /// Readiness that the server waits for.
    interest: EventFlags,
}

/// All clients.
pub struct Clients {
    listener: Listener,
    wake: Arc<Wake>,
    events: Events,
    handler: Arc<dyn Handler>,
    epoll: std::os::fd::OwnedFd,
    clients: BTreeMap<u64, Client>,
    next: u64,
    /// Turns of the loop so far.
    turn: u64,
    /// Clients that have had their turn and have more lines.
    backlog: BTreeSet<u64>,
    /// Descriptors of requests that are being answered.
    in_work: Vec<Untaken>,
}

impl Clients {
    pub fn new(
        listener: Listener,
        wake: Arc<Wake>,
        events: Events,
        handler: Arc<dyn Handler>,
    ) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let add = |fd: std::os::fd::BorrowedFd<'_>, token| {
            epoll::add(&epoll, fd, EventData::new_u64(token), EventFlags::IN)
        };
        use std::os::fd::AsFd;
        add(listener.socket.as_fd(), LISTENER)?;
        add(wake.as_fd(), WAKE)?;
        Ok(Self {
            listener,
            wake,
            events,
            handler,
            epoll,
            clients: BTreeMap::new(),
            next: FIRST_CLIENT,
            turn: 0,
            backlog: BTreeSet::new(),
            in_work: Vec::new(),
        })
    }

    /// Serves until the server is stopped.
    pub fn run(&mut self) {
        self.wake.bind();
        while !self.wake.stopped() {
            if let Err(error) = self.turn(None) {
                tracing::error!(%error, "the API's thread cannot wait for events");
                return;
            }
        }
        let deadline = Instant::now() + DRAIN;
        self.look_after_ready();
        while self
            .clients
            .values()
            .any(|c| c.interest.contains(EventFlags::OUT))
        {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.turn(Some(left)).is_err() {
                return;
            }
        }
    }

    fn turn(&mut self, patience: Option<Duration>) -> io::Result<()> {
        self.turn += 1;
        let patience = if self.backlog.is_empty() {
            patience.into_iter().chain(self.fds_patience()).min()
        } else {
            Some(Duration::ZERO)
        };
        let timeout = patience.map(|patience| Timespec {
            tv_sec: patience.as_secs() as i64,
            tv_nsec: patience.subsec_nanos().into(),
        });
        let mut events = Vec::with_capacity(EVENTS);
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut events),
            timeout.as_ref(),
        ) {
            Err(rustix::io::Errno::INTR) => return Ok(()),
            result => result?,
        };
        for event in events {
            match event.data.u64() {
                LISTENER => self.accept(),
                WAKE => self.wake.clear(),
                token => self.client(token, event.flags),
            }
        }
        for token in std::mem::take(&mut self.backlog) {
            self.look_after(token);
        }
        self.look_after_ready();
        self.drop_overdue();
        Ok(())
    }

    /// The shortest time that descriptors of an unfinished line may still wait.
    fn fds_patience(&self) -> Option<Duration> {
        let waiting = self.clients.values().filter_map(|client| client.oldest_fd);
        let since = waiting.map(|(_, since)| since).min()?;
        Some(FDS_PATIENCE.saturating_sub(since.elapsed()))
    }

    /// Disconnects clients whose descriptors have waited too long. A client that sent an end of its own connection
    /// would otherwise keep that connection open forever.
    fn drop_overdue(&mut self) {
        let overdue = |client: &Client| {
            let since = client.oldest_fd.map(|(_, since)| since);
            since.is_some_and(|since| since.elapsed() >= FDS_PATIENCE)
        };
        let tokens: Vec<_> = self
            .clients
            .iter()
            .filter(|(_, client)| overdue(client))
            .map(|(token, _)| *token)
            .collect();
        for token in tokens {
            self.disconnect(
                token,
                Some("sent descriptors without the end of their line"),
            );
        }
    }

    /// Descriptors kept for clients: of unfinished lines, of requests in progress, and of unread answers.
    fn held_fds(&mut self) -> usize {
        self.in_work.retain(|message| message.count() > 0);
        let in_work: usize = self.in_work.iter().map(Untaken::count).sum();
        let of = |client: &Client| client.reader.held_fds() + client.connection.unsent_fds();
        self.clients.values().map(of).sum::<usize>() + in_work
    }

    /// Serves clients that were answered: sends the answers, and continues with lines that waited for room.
    fn look_after_ready(&mut self) {
        loop {
            let mut ready = self.wake.take_ready();
            if ready.is_empty() {
                return;
            }
            ready.sort_unstable();
            ready.dedup();
            for token in ready {
                self.look_after(token);
            }
        }
    }

    fn accept(&mut self) {
        match self.listener.accept() {
            Ok((socket, peer)) => self.admit(socket, peer),
            Err(error) => self.cannot_accept(&error),
        }
    }

    /// Adds a connection as a client, or refuses it.
    pub fn admit(&mut self, socket: UnixStream, peer: Peer) {
        let others = || self.clients.values().filter(|client| !client.peer.own);
        let refusal = if !peer.allowed {
            Some((
                ErrorKind::Forbidden,
                "may not use this socket; ask its owner to allow this user",
            ))
        } else if self.clients.len() >= MAX_CLIENTS || !peer.own && others().count() >= MAX_OTHERS {
            Some((ErrorKind::Busy, "is one client too many"))
        } else {
            None
        };
        if let Some((kind, why)) = refusal {
            return refuse(&socket, &peer.name, kind, why);
        }
        let token = self.next;
        self.next += 1;
        let interest = EventFlags::IN;
        if let Err(error) = epoll::add(&self.epoll, &socket, EventData::new_u64(token), interest) {
            tracing::warn!(%error, "the API cannot wait on a client");
            return;
        }
        let client = Client {
            socket,
            peer,
            connection: Connection::new(self.wake.clone(), token),
            reader: LineReader::default(),
            ended: false,
            gone: false,
            lines: (0, 0),
            oldest_fd: None,
            interest,
        };
        self.clients.insert(token, client);
    }

    fn cannot_accept(&mut self, error: &io::Error) {
        use rustix::io::Errno;
        match Errno::from_io_error(error) {
            Some(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return,
            Some(Errno::MFILE | Errno::NFILE) => {
                if let Some(socket) = self.listener.accept_without_descriptors() {
                    let why = "finds the process out of descriptors";
                    refuse(&socket, "a client", ErrorKind::Busy, why);
                    drop(socket);
                    return self.listener.restore_spare();
                }
                self.listener.restore_spare();
            }
            _ => {}
        }
        tracing::warn!(%error, "the API cannot accept a client");
        // Otherwise the loop would try again at once.
        std::thread::sleep(Duration::from_millis(10));
    }

    fn client(&mut self, token: u64, flags: EventFlags) {
        let Some(client) = self.clients.get_mut(&token) else {
            return;
        };
        // Both directions are closed: answers cannot be read.
        if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            client.gone = true;
            client.connection.close();
        }
        let reads = flags.contains(EventFlags::IN) || client.gone;
        // Lines that were read are handled first: that bounds them.
        if reads && !client.ended && !client.reader.has_line() {
            let before = client.reader.held_fds();
            match client.reader.receive(&client.socket) {
                Ok(Progress::More) => {}
                Ok(Progress::End) => client.ended = true,
                Ok(Progress::TooManyFds) => {
                    return self
                        .disconnect(token, Some("sent more descriptors than a line may have"));
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                Err(_) => return self.disconnect(token, None),
            }
            let more = client.reader.held_fds() > before;
            if more && self.held_fds() > MAX_HELD_FDS {
                let why = "sent more descriptors than are kept for all clients together";
                return self.disconnect(token, Some(why));
            }
        }
        self.look_after(token);
    }

    /// Handles whole lines, sends answers, decides what to wait for.
    fn look_after(&mut self, token: u64) {
        let Some(client) = self.clients.get_mut(&token) else {
            return;
        };
        let connection = client.connection.clone();
        if client.lines.0 != self.turn {
            client.lines = (self.turn, 0);
        }
        let mut state;
        loop {
            let mut more = false;
            while connection.pending() < MAX_PENDING
                && client.lines.1 < TURN_LINES
                && let Some((line, fds)) = client.reader.next_line()
            {
                if line.len() > MAX_LINE {
                    return self.disconnect(token, Some("sent a line of more than 1 MiB"));
                }
                client.lines.1 += 1;
                let descriptors = Descriptors::of_message(fds);
                let untaken = descriptors.untaken();
                take_line(&connection, &self.events, &*self.handler, line, descriptors);
                if untaken.count() > 0 {
                    self.in_work.push(untaken);
                }
                more = true;
            }
            state = if client.gone {
                OutState::Empty
            } else {
                connection.flush(&client.socket)
            };
            if !more || state != OutState::Empty {
                break;
            }
        }
        match state {
            OutState::Empty | OutState::Full => {}
            OutState::Overflow => {
                return self.disconnect(token, Some("does not read its answers"));
            }
            // Its input is still read up to the end.
            OutState::Gone => {
                client.gone = true;
                connection.close();
            }
            OutState::Failed => return self.disconnect(token, None),
        }
        let room = connection.pending() < MAX_PENDING;
        if client.reader.unfinished() > MAX_LINE && room {
            return self.disconnect(token, Some("sent a line of more than 1 MiB"));
        }
        let lines_left = client.reader.has_line();
        if lines_left && room {
            self.backlog.insert(token);
        } else if client.gone && (client.ended || !room)
            || client.ended && state == OutState::Empty && connection.is_idle()
        {
            return self.disconnect(token, None);
        }
        client.oldest_fd = client.reader.oldest_fd().map(|at| match client.oldest_fd {
            Some((before, since)) if before == at => (at, since),
            _ => (at, Instant::now()),
        });
        if connection.unsent_fds() > 0 && self.held_fds() > MAX_HELD_FDS {
            return self.disconnect(token, Some("does not read its answers"));
        }
        self.wait_for(token, state, room);
    }

    fn wait_for(&mut self, token: u64, state: OutState, room: bool) {
        let Some(client) = self.clients.get_mut(&token) else {
            return;
        };
        let mut wanted = EventFlags::empty();
        wanted.set(EventFlags::OUT, state == OutState::Full);
        wanted.set(EventFlags::IN, !client.ended && room);
        if wanted != client.interest {
            client.interest = wanted;
            let data = EventData::new_u64(token);
            if let Err(error) = epoll::modify(&self.epoll, &client.socket, data, wanted) {
                tracing::warn!(%error, "the API cannot wait on a client");
                self.disconnect(token, None);
            }
        }
    }

    fn disconnect(&mut self, token: u64, why: Option<&str>) {
        let Some(client) = self.clients.remove(&token) else {
            return;
        };
        if let Some(why) = why {
            let name = &client.peer.name;
            tracing::warn!("{name} {why}: disconnected");
            let error = ApiError::new(ErrorKind::InvalidRequest, format!("{name} {why}"));
            client
                .connection
                .say(line(&Response::new(Id::Null, Err(error))));
            client.connection.flush(&client.socket);
        }
        client.connection.close();
        let _ = epoll::delete(&self.epoll, &client.socket);
    }
}

/// Sends a connection the reason why it is refused.
fn refuse(socket: &UnixStream, name: &str, kind: ErrorKind, why: &str) {
    tracing::warn!("{name} {why}: disconnected");
    let error = ApiError::new(kind, format!("{name} {why}"));
    let text = line(&Response::new(Id::Null, Err(error)));
    // A peer that does not read does not get the reason.
    let _ = crate::socket::send(socket, &text, &[]);
}

fn take_line(
    connection: &Arc<Connection>,
    events: &Events,
    handler: &dyn Handler,
    line: &[u8],
    descriptors: Descriptors,
) {
    if line.iter().all(u8::is_ascii_whitespace) {
        return;
    }
    let (requests, batch) = match Incoming::read(line) {
        Incoming::Single(request) => (vec![request], None),
        Incoming::Batch(requests) => {
            let batch = Batch::new(requests.len());
            (requests, Some(batch))
        }
    };
    for request in requests {
        let batch = batch.clone();
        match request {
            Err((id, error)) => Reply::new(connection.clone(), Some(id), batch).refuse(error),
            Ok(Request { id, method, params }) => {
                let reply = Reply::new(connection.clone(), id, batch);
                match Call::read(&method, params) {
                    Ok(call) => take_call(call, events, handler, descriptors.clone(), reply),
                    Err(error) => reply.refuse(error),
                }
            }
        }
    }
}

fn take_call(
    call: Call,
    events: &Events,
    handler: &dyn Handler,
    descriptors: Descriptors,
    reply: Reply,
) {
    match call {
        Call::Server(call) => answer(call, events, reply),
        Call::Status(call) => handler.status(call, reply),
        Call::Display(call) => handler.display(call, reply),
        Call::Machine(call) => handler.machine(call, descriptors, reply),
    }
}

/// Answers calls about the server itself.
fn answer(call: ServerCall, events: &Events, reply: Reply) {
    match call {
        ServerCall::ApiVersion(_) => reply.send::<ApiVersion>(Ok(Version {
            fanlight: env!("CARGO_PKG_VERSION").into(),
            api: API_VERSION.into(),
            pid: std::process::id(),
        })),
        ServerCall::ApiSchema(_) => reply.send_raw(schema::text()),
        ServerCall::EventsSubscribe(params) => {
            let connection = reply.connection();
            events.subscribe(&connection, params.events, |sequence| {
                reply.send::<EventsSubscribe>(Ok(Subscribed { sequence }));
            });
        }
    }
}
