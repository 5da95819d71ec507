//! A machine's life: started, reset, ended; signals, console input, and what the guest asks for.

use std::{
    collections::{BTreeSet, VecDeque},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    },
    time::{Duration, Instant},
};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use fanlight_api::{
    OnPanic, OnReset,
    server::Events as Published,
    types::{EventName, VmState},
};
use fanlight_devices::legacy::GuestRequest;
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    console::{Input, Received},
    desk::Desk,
    kvm::{VcpuError, processor_virtualizes},
    machine::{Callbacks, Machine, MachineError},
    resources::{Consoles, Holdings, Resources},
    status::Ending,
};

pub mod commands;

/// How long a guest has to shut down after SIGTERM pressed its power button.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(30);
/// A restart that comes this soon, this often, is not a restart but a guest that cannot start.
const RESTART_LOOP: (u32, Duration) = (5, Duration::from_secs(1));
/// Input that waits for a console with no room: more is left in the terminal or the socket.
const PENDING_INPUT: usize = 4096;

/// Why a machine's life ended badly.
#[derive(Debug, Error)]
pub enum LifeError {
    /// The machine could not be built.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A vCPU failed.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The guest restarts and restarts.
    #[error(
        "the guest restarted {} times within {:?} each: look at its console for why, or stop at the \
         first restart with --on-reset exit",
        RESTART_LOOP.0,
        RESTART_LOOP.1
    )]
    RestartLoop,
    /// Something of the host's failed.
    #[error("cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl LifeError {
    /// Whether what the user asked for cannot be on this host, rather than that something failed.
    pub fn is_bad_input(&self) -> bool {
        match self {
            LifeError::Machine(error) => error.is_bad_input(),
            LifeError::Vcpu(VcpuError::Emulation { .. }) => !processor_virtualizes(),
            _ => false,
        }
    }
}

/// What the main loop wakes up for.
#[derive(Debug)]
enum Event {
    Guest(GuestRequest),
    Failed(VcpuError),
    /// The guest has given up the device of a slot.
    Ejected(u8),
}

/// What comes of an event.
#[derive(Debug)]
enum Outcome {
    End(Ending),
    Restart,
    Failed(LifeError),
}

/// Runs the machine until its end. `started` is when the process started, for the log.
///
/// When it returns the machine is gone, and everybody who waited for that has been told.
pub fn run(
    resources: Resources,
    signals: &Signals,
    desk: &mut Desk,
    started: Instant,
) -> Result<Ending, LifeError> {
    let result = run_lives(resources, signals, desk, started);
    desk.ended(&result);
    result
}

fn run_lives(
    mut resources: Resources,
    signals: &Signals,
    desk: &mut Desk,
    started: Instant,
) -> Result<Ending, LifeError> {
    let mut restarts = 0;
    loop {
        let begun = Instant::now();
        let outcome = live(&mut resources, signals, desk, started)?;
        match outcome {
            Outcome::End(ending) => return Ok(ending),
            Outcome::Failed(error) => return Err(error),
            Outcome::Restart => {
                let asked_for = desk.is_starting();
                restarts = if begun.elapsed() < RESTART_LOOP.1 && !asked_for {
                    restarts + 1
                } else {
                    0
                };
                if restarts >= RESTART_LOOP.0 {
                    return Err(LifeError::RestartLoop);
                }
                tracing::info!("the guest restarts");
                desk.restarting();
                resources.ram.clear().map_err(MachineError::from)?;
            }
        }
    }
}

/// One life, from the first instruction to power-off or reset.
fn live(
    resources: &mut Resources,
    signals: &Signals,
    desk: &mut Desk,
    started: Instant,
) -> Result<Outcome, LifeError> {
    let host = |action| move |source| LifeError::Host { action, source };
    let (sender, events) = mpsc::channel();
    let wake = EventFd::new(EFD_NONBLOCK).map_err(host("make an event descriptor"))?;
    let callbacks = callbacks(
        sender,
        wake.try_clone().map_err(host("duplicate a descriptor"))?,
        desk.events.clone(),
    );
    let mut machine = Machine::build(resources, callbacks)?;
    tracing::info!(after = ?started.elapsed(), "the first vCPU is about to run");
    machine.start()?;
    desk.started();

    let mut manager =
        EventManager::new().map_err(|error| host("wait for events")(io::Error::other(error)))?;
    let (consoles, holdings) = resources.split();
    let main = manager.add_subscriber(MainLoop {
        on_reset: holdings.config.on_reset,
        on_panic: holdings.config.on_panic,
        inputs: inputs(consoles, &machine),
        holdings,
        machine,
        events,
        wake,
        signals,
        desk,
        requested: BTreeSet::new(),
        kill_at: None,
        outcome: None,
    });
    loop {
        let timeout = manager
            .subscriber_mut(main)
            .map_or(-1, |main| main.milliseconds_to_kill());
        manager
            .run_with_timeout(timeout)
            .map_err(|error| host("wait for events")(io::Error::other(error)))?;
        let Ok(main) = manager.subscriber_mut(main) else {
            continue;
        };
        main.check_patience();
        if let Some(outcome) = main.outcome.take() {
            tracing::info!(
                exits = main.machine.total_exits(),
                ?outcome,
                "the guest stops"
            );
            // What the guest was asked to give up does not come back after a reset.
            for id in main.machine.inventory.removing() {
                main.removed(&id);
            }
            return Ok(outcome);
        }
    }
}

fn callbacks(sender: Sender<Event>, wake: EventFd, published: Published) -> Callbacks {
    let send = Arc::new(move |event| {
        // The receiver is gone only when the machine is going down: nobody is interested then.
        if sender.send(event).is_ok()
            && let Err(error) = wake.write(1)
        {
            tracing::error!(%error, "cannot wake the main loop");
        }
    });
    let (failed, ejected) = (send.clone(), send.clone());
    Callbacks {
        requests: Arc::new(move |request| send(Event::Guest(request))),
        failures: Arc::new(move |error| failed(Event::Failed(error))),
        ejected: Arc::new(move |slot| ejected(Event::Ejected(slot))),
        device_failed: Arc::new(move |id| published.publish_device(EventName::DeviceError, id)),
    }
}

/// Gives bytes to a console; how many found room.
type Give = Box<dyn Fn(&[u8]) -> usize>;

/// A console of the machine with the host's side of its input.
struct ConsoleInput<'a> {
    source: &'a mut Input,
    give: Give,
    room: EventFd,
    pending: VecDeque<u8>,
    /// Whether the source is being waited on.
    waiting: bool,
}

fn inputs<'a>(consoles: Consoles<'a>, machine: &Machine) -> Vec<ConsoleInput<'a>> {
    let serial = machine.serial.clone();
    let mut inputs: Vec<(_, Give, _)> = vec![(
        &mut consoles.serial.input,
        Box::new(move |bytes: &[u8]| serial.input(bytes)),
        &machine.serial_room,
    )];
    if let (Some(host), Some((handle, room))) = (consoles.console, &machine.console) {
        let handle = handle.clone();
        if let Some((cols, rows)) = host.input.terminal_size() {
            handle.resize(cols, rows);
        }
        inputs.push((
            &mut host.input,
            Box::new(move |bytes: &[u8]| handle.input(bytes)),
            room,
        ));
    }
    inputs
        .into_iter()
        .filter_map(|(source, give, room)| {
            Some(ConsoleInput {
                source,
                give,
                room: room.try_clone().ok()?,
                pending: VecDeque::new(),
                waiting: false,
            })
        })
        .collect()
}

impl ConsoleInput<'_> {
    /// Gives the guest what waits; returns whether everything found room.
    fn push(&mut self) -> bool {
        while !self.pending.is_empty() {
            let (front, _) = self.pending.as_slices();
            let taken = (self.give)(front);
            if taken == 0 {
                return false;
            }
            self.pending.drain(..taken);
        }
        true
    }
}

struct MainLoop<'a> {
    machine: Machine,
    holdings: Holdings<'a>,
    desk: &'a mut Desk,
    /// Passed-through devices that the host wants back.
    requested: BTreeSet<String>,
    on_reset: OnReset,
    on_panic: OnPanic,
    inputs: Vec<ConsoleInput<'a>>,
    events: Receiver<Event>,
    wake: EventFd,
    signals: &'a Signals,
    /// When a guest that was asked to shut down is stopped.
    kill_at: Option<Instant>,
    outcome: Option<Outcome>,
}

/// Data of the loop's events. Inputs and the room in their consoles follow, two numbers for each.
const WAKE: u32 = 0;
const SIGNAL: u32 = 1;
const COMMAND: u32 = 2;
const REQUESTED: u32 = 3;
const FIRST_INPUT: u32 = 4;

impl MainLoop<'_> {
    fn milliseconds_to_kill(&self) -> i32 {
        self.kill_at.map_or(-1, |at| {
            let left = at.saturating_duration_since(Instant::now()).as_millis();
            i32::try_from(left).map_or(i32::MAX, |left| left.saturating_add(1))
        })
    }

    fn check_patience(&mut self) {
        if self.kill_at.is_some_and(|at| Instant::now() >= at) {
            tracing::warn!("the guest did not shut down within {SHUTDOWN_PATIENCE:?}: stopped");
            self.end(Outcome::End(Ending::Stopped));
        }
    }

    /// The first outcome counts.
    fn end(&mut self, outcome: Outcome) {
        self.outcome.get_or_insert(outcome);
    }

    fn take_events(&mut self) {
        let _ = self.wake.read();
        while let Ok(event) = self.events.try_recv() {
            match event {
                Event::Ejected(slot) => {
                    if let Some(id) = self.machine.inventory.ejected(slot) {
                        self.removed(&id);
                    }
                }
                Event::Failed(error) => self.end(Outcome::Failed(error.into())),
                Event::Guest(GuestRequest::PowerOff) => self.end(Outcome::End(Ending::PowerOff)),
                Event::Guest(GuestRequest::Reset) => self.end(match self.on_reset {
                    OnReset::Restart => Outcome::Restart,
                    OnReset::Exit => Outcome::End(Ending::Reset),
                }),
                Event::Guest(GuestRequest::Panicked) => {
                    tracing::error!("the guest's kernel panicked");
                    self.desk.events.publish(EventName::Panic);
                    match self.on_panic {
                        OnPanic::Exit => self.end(Outcome::End(Ending::Panicked)),
                        OnPanic::Restart => self.end(Outcome::Restart),
                        OnPanic::Continue => {}
                    }
                }
                Event::Guest(GuestRequest::CrashLoaded) => {
                    tracing::error!("the guest's kernel panicked and starts its crash kernel");
                    self.desk.events.publish(EventName::Panic);
                }
            }
        }
    }

    fn take_signals(&mut self) {
        let signals = self.signals.take();
        if signals.resized {
            self.resize_console();
        }
        for _ in 0..signals.terminate {
            self.terminate();
        }
    }

    /// The first SIGTERM presses the power button, the second ends the machine.
    fn terminate(&mut self) {
        if self.kill_at.is_some() {
            return self.end(Outcome::End(Ending::Stopped));
        }
        self.desk.leave();
        if self.desk.state() == VmState::Paused {
            // A guest that stands still would never know.
            self.resume_silently();
        }
        tracing::info!("asked the guest to shut down; a second signal stops it at once");
        self.kill_at = Some(Instant::now() + SHUTDOWN_PATIENCE);
        if let Err(error) = self.machine.press_power_button() {
            tracing::error!(%error, "cannot press the guest's power button");
            self.end(Outcome::End(Ending::Stopped));
        }
    }

    fn resize_console(&self) {
        if let (Some((handle, _)), Some(input)) = (&self.machine.console, self.inputs.get(1))
            && let Some((cols, rows)) = input.source.terminal_size()
        {
            handle.resize(cols, rows);
        }
    }

    /// Input came, or a console has room again.
    fn move_input(&mut self, index: usize, readable: bool, ops: &mut EventOps) {
        let Some(input) = self.inputs.get_mut(index) else {
            return;
        };
        let mut ended = false;
        let mut quit = false;
        if readable {
            match input.source.receive() {
                Received::Bytes(bytes) => input.pending.extend(bytes),
                Received::End => ended = true,
                Received::Quit => quit = true,
            }
        } else {
            let _ = input.room.read();
        }
        let all_taken = input.push();
        let wanted = !ended && (all_taken || input.pending.len() < PENDING_INPUT);
        if wanted != input.waiting && (readable || !ended) {
            set_waiting(input, index, wanted, ops);
        }
        if quit {
            self.end(Outcome::End(Ending::Stopped));
        }
    }
}

/// Starts or stops waiting on a console's source.
fn set_waiting(input: &mut ConsoleInput, index: usize, wanted: bool, ops: &mut EventOps) {
    for fd in input.source.fds() {
        let event = Events::with_data_raw(fd, FIRST_INPUT + 2 * index as u32, EventSet::IN);
        let result = if wanted {
            ops.add(event)
        } else {
            ops.remove(event)
        };
        // A regular file as standard input cannot be waited on.
        if let Err(error) = result {
            tracing::info!(%error, "no console input");
        }
    }
    input.waiting = wanted;
}

impl MutEventSubscriber for MainLoop<'_> {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            WAKE => self.take_events(),
            SIGNAL => self.take_signals(),
            COMMAND => self.take_commands(),
            REQUESTED => self.take_requests(),
            data => {
                let (index, room) = ((data - FIRST_INPUT) / 2, (data - FIRST_INPUT) % 2 == 1);
                self.move_input(index as usize, !room, ops);
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let mut add = |fd: RawFd, data| {
            if let Err(error) = ops.add(Events::with_data_raw(fd, data, EventSet::IN)) {
                tracing::error!(%error, "the main loop cannot wait on a descriptor");
            }
        };
        add(self.wake.as_raw_fd(), WAKE);
        add(self.signals.as_fd().as_raw_fd(), SIGNAL);
        add(self.desk.as_fd().as_raw_fd(), COMMAND);
        add(self.holdings.requests.as_fd().as_raw_fd(), REQUESTED);
        for (index, input) in (0..).zip(&self.inputs) {
            add(input.room.as_raw_fd(), FIRST_INPUT + 2 * index + 1);
        }
        for (index, input) in self.inputs.iter_mut().enumerate() {
            set_waiting(input, index, true, ops);
        }
    }
}

/// Signals that came in.
#[derive(Debug, Default)]
struct Caught {
    terminate: usize,
    resized: bool,
}

/// Signals as bytes in sockets.
pub struct Signals {
    terminate: UnixStream,
    resized: UnixStream,
    /// Both behind one descriptor.
    epoll: std::os::fd::OwnedFd,
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

    fn take(&self) -> Caught {
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
