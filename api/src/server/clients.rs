//! The server's loop: accepts, reads lines, calls the handler, writes.

use std::{
    collections::BTreeMap,
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
    Events, Handler, MAX_CLIENTS, MAX_LINE, MAX_PENDING, Reply,
    connection::{Batch, Connection, OutState, Wake},
    listener::Listener,
};
use crate::{
    API_VERSION,
    error::{ApiError, ErrorKind},
    message::{Id, Incoming, Request, Response, line},
    methods::{ApiVersion, Call, EventsSubscribe},
    schema,
    socket::{Descriptors, LineReader, Progress},
    types::{Subscribed, Version},
};

/// How long the end waits for clients to take their answers.
const DRAIN: Duration = Duration::from_secs(1);
/// Events taken at a time.
const EVENTS: usize = 64;

const LISTENER: u64 = 0;
const WAKE: u64 = 1;
const FIRST_CLIENT: u64 = 2;

/// A client as the server's thread sees it.
struct Client {
    socket: UnixStream,
    name: String,
    connection: Arc<Connection>,
    reader: LineReader,
    /// The client will send no more; it may still read.
    ended: bool,
    /// What the socket is waited for.
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
        self.look_after_ready();
        Ok(())
    }

    /// Clients that were answered: sends, and goes on with what waited for room.
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
        let (socket, name, allowed) = match self.listener.accept() {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                tracing::warn!(%error, "the API cannot accept a client");
                // Out of descriptors, perhaps: the next try may find some.
                std::thread::sleep(Duration::from_millis(10));
                return;
            }
        };
        let refusal = if !allowed {
            Some((
                ErrorKind::Forbidden,
                "may not use this socket; --api-allow-uid lets more users in",
            ))
        } else if self.clients.len() >= MAX_CLIENTS {
            Some((ErrorKind::Busy, "is one client too many"))
        } else {
            None
        };
        if let Some((kind, why)) = refusal {
            tracing::warn!("{name} {why}: disconnected");
            let error = ApiError::new(kind, format!("{name} {why}"));
            let text = line(&Response::new(Id::Null, Err(error)));
            let _ = crate::socket::send(&socket, &text, &[]);
            return;
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
            name,
            connection: Connection::new(self.wake.clone(), token),
            reader: LineReader::default(),
            ended: false,
            interest,
        };
        self.clients.insert(token, client);
    }

    fn client(&mut self, token: u64, flags: EventFlags) {
        let Some(client) = self.clients.get_mut(&token) else {
            return;
        };
        // Both directions are closed: nobody reads an answer.
        if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            self.disconnect(token, None);
            return;
        }
        if flags.contains(EventFlags::IN) {
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
        }
        self.look_after(token);
    }

    /// Handles whole lines, sends answers, decides what to wait for.
    fn look_after(&mut self, token: u64) {
        let Some(client) = self.clients.get_mut(&token) else {
            return;
        };
        let connection = client.connection.clone();
        let mut state;
        loop {
            let mut more = false;
            while connection.pending() < MAX_PENDING
                && let Some((line, fds)) = client.reader.next_line()
            {
                if line.len() > MAX_LINE {
                    return self.disconnect(token, Some("sent a line of more than 1 MiB"));
                }
                take_line(&connection, &self.events, &*self.handler, line, fds);
                more = true;
            }
            state = connection.flush(&client.socket);
            if !more || state != OutState::Empty {
                break;
            }
        }
        match state {
            OutState::Empty | OutState::Full => {}
            OutState::Overflow => {
                return self.disconnect(token, Some("does not read its answers"));
            }
            OutState::Gone => return self.disconnect(token, None),
        }
        if client.reader.unfinished() > MAX_LINE && connection.pending() < MAX_PENDING {
            return self.disconnect(token, Some("sent a line of more than 1 MiB"));
        }
        if client.ended && state == OutState::Empty && connection.is_idle() {
            return self.disconnect(token, None);
        }
        let mut wanted = EventFlags::empty();
        wanted.set(EventFlags::OUT, state == OutState::Full);
        wanted.set(
            EventFlags::IN,
            !client.ended && connection.pending() < MAX_PENDING,
        );
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
            tracing::warn!("{} {why}: disconnected", client.name);
            let error = ApiError::new(ErrorKind::InvalidRequest, format!("{} {why}", client.name));
            client
                .connection
                .say(line(&Response::new(Id::Null, Err(error))));
            client.connection.flush(&client.socket);
        }
        client.connection.close();
        let _ = epoll::delete(&self.epoll, &client.socket);
    }
}

fn take_line(
    connection: &Arc<Connection>,
    events: &Events,
    handler: &dyn Handler,
    line: &[u8],
    fds: Vec<std::os::fd::OwnedFd>,
) {
    if line.iter().all(u8::is_ascii_whitespace) {
        return;
    }
    let descriptors = Descriptors::of_message(fds);
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
        Call::ApiVersion(_) => reply.send::<ApiVersion>(Ok(Version {
            fanlight: env!("CARGO_PKG_VERSION").into(),
            api: API_VERSION.into(),
            pid: std::process::id(),
        })),
        Call::ApiSchema(_) => reply.send_raw(schema::text()),
        Call::EventsSubscribe(params) => {
            let connection = reply.connection();
            events.subscribe(&connection, params.events, |sequence| {
                reply.send::<EventsSubscribe>(Ok(Subscribed { sequence }));
            });
        }
        call => handler.call(call, descriptors, reply),
    }
}
