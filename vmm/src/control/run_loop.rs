//! A machine's life: started, reset, ended; signals, console input, and what the guest asks for.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
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
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    control::console_input::{ConsoleInput, inputs},
    control::panic_grace::LastWords,
    control::queue::Desk,
    host::console::Received,
    host::resources::{Holdings, Resources},
    host::signals::Signals,
    kvm::VcpuError,
    vm::ending::Ending,
    vm::error::LifeError,
    vm::machine::{Callbacks, Machine, MachineError},
};

/// How long a guest has to shut down after SIGTERM pressed its power button.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(30);
/// A restart that comes this soon, this often, is not a restart but a guest that cannot start.
const RESTART_LOOP: (u32, Duration) = (5, Duration::from_secs(1));
/// Input that waits for a console with no room: more is left in the terminal or the socket.
const PENDING_INPUT: usize = 4096;

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
pub(super) enum Outcome {
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
                    return Err(LifeError::RestartLoop {
                        times: RESTART_LOOP.0,
                        within: RESTART_LOOP.1,
                    });
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
        last_words: None,
        outcome: None,
    });
    loop {
        let timeout = manager
            .subscriber_mut(main)
            .map_or(-1, |main| main.patience());
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

pub(super) struct MainLoop<'a> {
    pub(super) machine: Machine,
    pub(super) holdings: Holdings<'a>,
    pub(super) desk: &'a mut Desk,
    /// Passed-through devices that the host wants back.
    pub(super) requested: BTreeSet<String>,
    on_reset: OnReset,
    on_panic: OnPanic,
    pub(super) inputs: Vec<ConsoleInput<'a>>,
    events: Receiver<Event>,
    wake: EventFd,
    signals: &'a Signals,
    /// When a guest that was asked to shut down is stopped.
    kill_at: Option<Instant>,
    /// What comes of a panic, once its messages are out.
    last_words: Option<(LastWords, Outcome)>,
    pub(super) outcome: Option<Outcome>,
}

/// Data of the loop's events. Inputs and the room in their consoles follow, two numbers for each.
const WAKE: u32 = 0;
const SIGNAL: u32 = 1;
const COMMAND: u32 = 2;
const REQUESTED: u32 = 3;
const FIRST_INPUT: u32 = 4;

impl MainLoop<'_> {
    /// Milliseconds until [`Self::check_patience`] has something to look at; -1 for never.
    fn patience(&self) -> i32 {
        let look = self.last_words.as_ref().map(|(words, _)| words.look_at());
        self.kill_at.into_iter().chain(look).min().map_or(-1, |at| {
            let left = at.saturating_duration_since(Instant::now()).as_millis();
            i32::try_from(left).map_or(i32::MAX, |left| left.saturating_add(1))
        })
    }

    fn check_patience(&mut self) {
        let now = Instant::now();
        if self.kill_at.is_some_and(|at| now >= at) {
            tracing::warn!("the guest did not shut down within {SHUTDOWN_PATIENCE:?}: stopped");
            self.end(Outcome::End(Ending::Stopped));
        }
        let exits = self.machine.total_exits();
        if let Some((mut words, outcome)) = self.last_words.take() {
            if words.are_over(now, exits) {
                self.end(outcome);
            } else {
                self.last_words = Some((words, outcome));
            }
        }
    }

    /// The first outcome counts.
    pub(super) fn end(&mut self, outcome: Outcome) {
        self.outcome.get_or_insert(outcome);
    }

    /// The guest has ended its life by itself: after a panic that comes of the panic.
    fn gone(&mut self, outcome: Outcome) {
        let panicked = self.last_words.take().map(|(_, outcome)| outcome);
        self.end(panicked.unwrap_or(outcome));
    }

    fn take_events(&mut self) {
        let _ = self.wake.read();
        while self.outcome.is_none()
            && let Ok(event) = self.events.try_recv()
        {
            match event {
                Event::Ejected(slot) => {
                    if let Some(id) = self.machine.inventory.ejected(slot) {
                        self.removed(&id);
                    }
                }
                Event::Failed(error) => self.end(Outcome::Failed(error.into())),
                Event::Guest(GuestRequest::PowerOff) => self.gone(Outcome::End(Ending::PowerOff)),
                Event::Guest(GuestRequest::Reset) => self.gone(match self.on_reset {
                    OnReset::Restart => Outcome::Restart,
                    OnReset::Exit => Outcome::End(Ending::Reset),
                }),
                Event::Guest(GuestRequest::Panicked) => {
                    tracing::error!("the guest's kernel panicked");
                    self.desk.events.publish(EventName::Panic);
                    let outcome = match self.on_panic {
                        OnPanic::Exit => Outcome::End(Ending::Panicked),
                        OnPanic::Restart => Outcome::Restart,
                        OnPanic::Continue => continue,
                    };
                    let words = LastWords::begin(Instant::now(), self.machine.total_exits());
                    self.last_words.get_or_insert((words, outcome));
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
