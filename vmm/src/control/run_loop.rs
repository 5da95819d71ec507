//! The main loop: runs a machine, restarts it on a reset, and handles signals, console input and calls of the API.

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
    control::{
        console_input::{ConsoleInput, inputs},
        panic_grace::PanicGrace,
        queue::ControlQueue,
        running::{Outcome, RunningMachine},
    },
    host::console::Received,
    host::signals::Signals,
    kvm::VcpuError,
    vm::ending::Ending,
    vm::error::{MachineError, RunError},
    vm::machine::{Callbacks, Machine},
    vm::resources::Resources,
};

/// How long a guest has to shut down after SIGTERM pressed its power button.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(30);
/// A guest that restarts this many times in a row, each within this time of its start, cannot start.
const RESTART_LOOP: (u32, Duration) = (5, Duration::from_secs(1));
/// Bytes of input kept for a console that is full. More stays in the terminal or the socket.
const PENDING_INPUT: usize = 4096;

/// What vCPUs and devices report to the main loop.
#[derive(Debug)]
enum Event {
    Guest(GuestRequest),
    Failed(VcpuError),
    /// The guest has released the device in a slot.
    Ejected(u8),
}

/// Runs the machine until its end. `started` is when the process started, for the log.
///
/// When it returns, the machine is gone and all calls that waited for that are answered.
pub fn run(
    resources: Resources,
    signals: &Signals,
    queue: &mut ControlQueue,
    started: Instant,
) -> Result<Ending, RunError> {
    let result = run_lives(resources, signals, queue, started);
    queue.ended(&result);
    result
}

fn run_lives(
    mut resources: Resources,
    signals: &Signals,
    queue: &mut ControlQueue,
    started: Instant,
) -> Result<Ending, RunError> {
    let mut restarts = 0;
    // A guest that restarts when it is asked to shut down gets no more time by that.
    let mut kill_at = None;
    loop {
        let begun = Instant::now();
        let outcome = live(&mut resources, signals, queue, started, &mut kill_at)?;
        match outcome {
            Outcome::End(ending) => return Ok(ending),
            Outcome::Failed(error) => return Err(error),
            Outcome::Restart => {
                let asked_for = queue.is_starting();
                restarts = if begun.elapsed() < RESTART_LOOP.1 && !asked_for {
                    restarts + 1
                } else {
                    0
                };
                if restarts >= RESTART_LOOP.0 {
                    return Err(RunError::RestartLoop {
                        times: RESTART_LOOP.0,
                        within: RESTART_LOOP.1,
                    });
                }
                tracing::info!("the guest restarts");
                queue.restarting();
                resources.ram.clear().map_err(MachineError::from)?;
            }
        }
    }
}

/// One life, from the first instruction to power-off or reset.
fn live(
    resources: &mut Resources,
    signals: &Signals,
    queue: &mut ControlQueue,
    started: Instant,
    kill_at: &mut Option<Instant>,
) -> Result<Outcome, RunError> {
    let host = |action| move |source| RunError::Host { action, source };
    let (sender, events) = mpsc::channel();
    let wake = EventFd::new(EFD_NONBLOCK).map_err(host("make an event descriptor"))?;
    let callbacks = callbacks(
        sender,
        wake.try_clone().map_err(host("duplicate a descriptor"))?,
        queue.events.clone(),
    );
    let mut machine = Machine::build(resources, callbacks)?;
    tracing::info!(after = ?started.elapsed(), "the first vCPU is about to run");
    machine.start()?;
    queue.started();

    let mut manager =
        EventManager::new().map_err(|error| host("wait for events")(io::Error::other(error)))?;
    let guests = std::mem::take(&mut machine.consoles);
    let main = manager.add_subscriber(MainLoop {
        on_reset: resources.config().on_reset,
        on_panic: resources.config().on_panic,
        vm: RunningMachine {
            inputs: inputs(&mut resources.consoles, guests),
            hotplug: &mut resources.hotplug,
            ram: &resources.ram,
            machine,
            queue,
            requested: BTreeSet::new(),
            outcome: None,
        },
        events,
        wake,
        signals,
        kill_at,
        panic_grace: None,
    });
    loop {
        let timeout = manager
            .subscriber_mut(main)
            .map_or(-1, |main| main.timeout());
        manager
            .run_with_timeout(timeout)
            .map_err(|error| host("wait for events")(io::Error::other(error)))?;
        let Ok(main) = manager.subscriber_mut(main) else {
            continue;
        };
        main.check_deadlines();
        if let Some(outcome) = main.vm.outcome.take() {
            tracing::info!(
                exits = main.vm.machine.processors.total_exits(),
                ?outcome,
                "the guest stops"
            );
            // Devices whose removal is under way do not come back after a reset.
            for id in main.vm.machine.topology.removing() {
                main.vm.removed(&id);
            }
            return Ok(outcome);
        }
    }
}

fn callbacks(sender: Sender<Event>, wake: EventFd, published: Published) -> Callbacks {
    let send = Arc::new(move |event| {
        // The receiver is gone only while the machine ends.
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

struct MainLoop<'a> {
    vm: RunningMachine<'a>,
    on_reset: OnReset,
    on_panic: OnPanic,
    events: Receiver<Event>,
    wake: EventFd,
    signals: &'a Signals,
    /// When a guest that was asked to shut down is stopped, in this life or a later one.
    kill_at: &'a mut Option<Instant>,
    /// The time that a guest has after a panic to flush its consoles, and what follows it.
    panic_grace: Option<(PanicGrace, Outcome)>,
}

/// Data of epoll events. Each console has two more: its input, and room in the console.
const WAKE: u32 = 0;
const SIGNAL: u32 = 1;
const COMMAND: u32 = 2;
const REQUESTED: u32 = 3;
const FIRST_INPUT: u32 = 4;

impl MainLoop<'_> {
    /// Milliseconds until the next deadline of [`Self::check_deadlines`]; -1 for none.
    fn timeout(&self) -> i32 {
        let grace = self.panic_grace.as_ref().map(|(grace, _)| grace.check_at());
        self.kill_at
            .iter()
            .copied()
            .chain(grace)
            .min()
            .map_or(-1, |at| {
                let left = at.saturating_duration_since(Instant::now()).as_millis();
                i32::try_from(left).map_or(i32::MAX, |left| left.saturating_add(1))
            })
    }

    fn check_deadlines(&mut self) {
        let now = Instant::now();
        if self.kill_at.is_some_and(|at| now >= at) {
            tracing::warn!("the guest did not shut down within {SHUTDOWN_PATIENCE:?}: stopped");
            self.vm.end(Outcome::End(Ending::Stopped));
        }
        let exits = self.vm.machine.processors.total_exits();
        if let Some((mut grace, outcome)) = self.panic_grace.take() {
            if grace.is_over(now, exits) {
                self.vm.end(outcome);
            } else {
                self.panic_grace = Some((grace, outcome));
            }
        }
    }

    /// The guest has powered off or reset. After a panic, the action for the panic counts instead.
    fn ended_by_guest(&mut self, outcome: Outcome) {
        let panicked = self.panic_grace.take().map(|(_, outcome)| outcome);
        self.vm.end(panicked.unwrap_or(outcome));
    }

    fn take_events(&mut self) {
        let _ = self.wake.read();
        while self.vm.outcome.is_none()
            && let Ok(event) = self.events.try_recv()
        {
            match event {
                Event::Ejected(slot) => {
                    if let Some(id) = self.vm.machine.topology.ejected(slot) {
                        self.vm.removed(&id);
                    }
                }
                Event::Failed(error) => self.vm.end(Outcome::Failed(error.into())),
                Event::Guest(GuestRequest::PowerOff) => {
                    self.ended_by_guest(Outcome::End(Ending::PowerOff))
                }
                Event::Guest(GuestRequest::Reset) => self.ended_by_guest(match self.on_reset {
                    OnReset::Restart => Outcome::Restart,
                    OnReset::Exit => Outcome::End(Ending::Reset),
                }),
                Event::Guest(GuestRequest::Panicked) => {
                    tracing::error!("the guest's kernel panicked");
                    self.vm.queue.events.publish(EventName::Panic);
                    let outcome = match self.on_panic {
                        OnPanic::Exit => Outcome::End(Ending::Panicked),
                        OnPanic::Restart => Outcome::Restart,
                        OnPanic::Continue => continue,
                    };
                    let grace =
                        PanicGrace::begin(Instant::now(), self.vm.machine.processors.total_exits());
                    self.panic_grace.get_or_insert((grace, outcome));
                }
                Event::Guest(GuestRequest::CrashLoaded) => {
                    tracing::error!("the guest's kernel panicked and starts its crash kernel");
                    self.vm.queue.events.publish(EventName::Panic);
                }
            }
        }
    }

    fn take_commands(&mut self) {
        // Later commands are for the machine after this one, or after the restart.
        if self.vm.outcome.is_none()
            && let Some(command) = self.vm.queue.next()
        {
            self.vm.answer(command);
        }
    }

    fn take_signals(&mut self) {
        let signals = self.signals.take();
        if signals.resized {
            self.vm.inputs.iter().for_each(ConsoleInput::resize);
        }
        for _ in 0..signals.terminate {
            self.terminate();
        }
    }

    /// The first SIGTERM presses the power button, the second ends the machine.
    fn terminate(&mut self) {
        if self.kill_at.is_some() {
            return self.vm.end(Outcome::End(Ending::Stopped));
        }
        self.vm.queue.leave();
        if self.vm.queue.state() == VmState::Paused {
            // A paused guest would not notice the power button.
            self.vm.resume_silently();
        }
        tracing::info!("asked the guest to shut down; a second signal stops it at once");
        *self.kill_at = Some(Instant::now() + SHUTDOWN_PATIENCE);
        if let Err(error) = self.vm.machine.press_power_button() {
            tracing::error!(%error, "cannot press the guest's power button");
            self.vm.end(Outcome::End(Ending::Stopped));
        }
    }

    /// Input arrived, or a console has room again.
    fn move_input(&mut self, index: usize, readable: bool, ops: &mut EventOps) {
        let Some(input) = self.vm.inputs.get_mut(index) else {
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
            let _ = input.guest.room.read();
        }
        let all_taken = input.push();
        let wanted = !ended && (all_taken || input.pending.len() < PENDING_INPUT);
        if wanted != input.waiting && (readable || !ended) {
            set_waiting(input, index, wanted, ops);
        }
        if quit {
            self.vm.end(Outcome::End(Ending::Stopped));
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
            REQUESTED => self.vm.take_requests(),
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
        add(self.vm.queue.as_fd().as_raw_fd(), COMMAND);
        add(self.vm.hotplug.requests.as_fd().as_raw_fd(), REQUESTED);
        for (index, input) in (0..).zip(&self.vm.inputs) {
            add(input.guest.room.as_raw_fd(), FIRST_INPUT + 2 * index + 1);
        }
        for (index, input) in self.vm.inputs.iter_mut().enumerate() {
            set_waiting(input, index, true, ops);
        }
    }
}
