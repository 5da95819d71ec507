//! The machine's front desk: takes the API's calls on the server's thread, answers at once what needs no
//! machine, and passes the rest on to the thread that owns the machine's life.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver, Sender},
    },
};

use fanlight_api::{
    ApiError, ErrorKind, VmConfig,
    methods::{self, Call, Method},
    server::{Events, Handler, Reply},
    socket::Descriptors,
    types::{Done, Ended, EventName, StateNow, VmEnding, VmInfo, VmState},
};
use fanlight_devices::error_line;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    display::api::Display, host::resources::Resources, vm::ending::Ending, vm::error::LifeError,
    vm::graphics::Graphics,
};

/// Empty root ports of a machine that has an API, where nobody says how many.
pub const DEFAULT_HOTPLUG_PORTS: u8 = 4;

/// So many calls of `vm.wait` are kept without a look at whether their clients are still there.
const MANY_WAITING: usize = 64;

/// Changes what is logged; the error says what is wrong with the text.
pub type SetLog = Box<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// A call that the owner of the machine answers.
#[derive(Debug)]
pub struct Command {
    /// The method with its parameters.
    pub call: Call,
    /// What came with it.
    pub descriptors: Descriptors,
    /// Its answer.
    pub reply: Reply,
}

/// What anybody may know of the machine at any time.
#[derive(Debug, Default)]
struct Known {
    info: VmInfo,
    config: Option<VmConfig>,
    displays: Vec<Display>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The side of the server.
struct Counter {
    commands: Sender<Command>,
    wake: EventFd,
    known: Arc<Mutex<Known>>,
    set_log: SetLog,
}

impl Handler for Counter {
    fn call(&self, call: Call, descriptors: Descriptors, reply: Reply) {
        match call {
            Call::VmInfoMethod(_) => {
                let info = locked(&self.known).info.clone();
                reply.send::<methods::VmInfoMethod>(Ok(info));
            }
            Call::VmConfigMethod(_) => {
                let config = locked(&self.known).config.clone();
                let none = || {
                    refusal(
                        VmState::None,
                        "vm.config",
                        "a machine must have been created",
                    )
                };
                reply.send::<methods::VmConfigMethod>(config.ok_or_else(none));
            }
            Call::LogSetLevel(params) => {
                let result = (self.set_log)(&params.level)
                    .map_err(|error| ApiError::new(ErrorKind::InvalidParams, error).at("level"));
                reply.send::<methods::LogSetLevel>(result.map(|()| Done {}));
            }
            Call::GpuOutputs(params) => {
                self.display("gpu.outputs", params.gpu, reply, |display, reply| {
                    reply.send::<methods::GpuOutputs>(Ok(display.outputs()));
                });
            }
            Call::GpuSetOutput(params) => {
                self.display(
                    "gpu.set_output",
                    params.gpu,
                    reply,
                    move |display, reply| {
                        reply.send::<methods::GpuSetOutput>(display.set_output(&params));
                    },
                );
            }
            Call::GpuScreenshot(params) => {
                self.display(
                    "gpu.screenshot",
                    params.gpu,
                    reply,
                    move |display, reply| {
                        let taken = display.screenshot(&params);
                        answer_with::<methods::GpuScreenshot>(reply, taken);
                    },
                );
            }
            Call::GpuExportScanout(params) => {
                self.display(
                    "gpu.export_scanout",
                    params.gpu,
                    reply,
                    move |display, reply| {
                        let exported = display.export_scanout(params.output);
                        answer_with::<methods::GpuExportScanout>(reply, exported.map(some_fd));
                    },
                );
            }
            Call::GpuExportResource(params) => {
                self.display(
                    "gpu.export_resource",
                    params.gpu,
                    reply,
                    move |display, reply| {
                        let exported = display.export_resource(params.resource);
                        answer_with::<methods::GpuExportResource>(reply, exported.map(some_fd));
                    },
                );
            }
            Call::DisplaySubscribe(params) => {
                self.display(
                    "display.subscribe",
                    params.gpu,
                    reply,
                    move |display, reply| {
                        let stream = display.subscribe(&params);
                        answer_with::<methods::DisplaySubscribe>(reply, stream.map(some_fd));
                    },
                );
            }
            call => {
                let command = Command {
                    call,
                    descriptors,
                    reply,
                };
                // If the owner is gone the reply says so as it is dropped.
                if self.commands.send(command).is_ok()
                    && let Err(error) = self.wake.write(1)
                {
                    tracing::error!(%error, "cannot wake the main loop");
                }
            }
        }
    }
}

impl Counter {
    /// Has the call of a GPU's display answered on a thread of its own: pictures take time.
    fn display(
        &self,
        method: &str,
        gpu: u32,
        reply: Reply,
        work: impl FnOnce(&Display, Reply) + Send + 'static,
    ) {
        let (state, count, display) = {
            let known = locked(&self.known);
            let display = known.displays.get(gpu as usize);
            (known.info.state, known.displays.len(), display.cloned())
        };
        let Some(display) = display else {
            let error = if count == 0 {
                let text = "the machine has no GPU; give it one with --gpu";
                ApiError::new(ErrorKind::NotFound, text)
            } else {
                let text = format!("there is no GPU {gpu}: the last one is {}", count - 1);
                ApiError::new(ErrorKind::NotFound, text).at("gpu")
            };
            return reply.refuse(error);
        };
        if !matches!(state, VmState::Running | VmState::Paused) {
            return reply.refuse(refusal(state, method, "it must be running or paused"));
        }
        display.answer(reply, work);
    }
}

fn some_fd<T>((result, fd): (T, OwnedFd)) -> (T, Option<OwnedFd>) {
    (result, Some(fd))
}

/// Answers with a descriptor, if there is one.
fn answer_with<M: Method>(reply: Reply, result: Result<(M::Result, Option<OwnedFd>), ApiError>) {
    match result {
        Ok((result, fd)) => reply.send_with::<M>(Ok(result), fd.into_iter().collect()),
        Err(error) => reply.refuse(error),
    }
}

/// The side of the machine's owner.
pub struct Desk {
    commands: Receiver<Command>,
    wake: EventFd,
    known: Arc<Mutex<Known>>,
    /// Where what happens is published.
    pub events: Events,
    /// `vm.boot` and `vm.reset` that are under way.
    starting: Vec<Reply>,
    /// `vm.stop` that is under way.
    stopping: Vec<Reply>,
    /// `vm.wait`.
    waiting: Vec<Reply>,
    /// With so many of them, those are forgotten whose clients have gone.
    waiting_until_pruned: usize,
    last_error: Option<String>,
    /// The process is to end when the machine has.
    leaving: bool,
}

/// Readable when a command has come.
impl AsFd for Desk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the event's, which lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.wake.as_raw_fd()) }
    }
}

impl Desk {
    /// A desk, and what the server needs to send calls to it.
    pub fn new(set_log: SetLog) -> io::Result<(Self, Arc<dyn Handler>)> {
        let (sender, commands) = mpsc::channel();
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let known = Arc::<Mutex<Known>>::default();
        let counter = Counter {
            commands: sender,
            wake: wake.try_clone()?,
            known: known.clone(),
            set_log,
        };
        let desk = Self {
            commands,
            wake,
            known,
            events: Events::default(),
            starting: Vec::new(),
            stopping: Vec::new(),
            waiting: Vec::new(),
            waiting_until_pruned: MANY_WAITING,
            last_error: None,
            leaving: false,
        };
        Ok((desk, Arc::new(counter)))
    }

    /// The next command, if there is one.
    pub fn next(&self) -> Option<Command> {
        let _ = self.wake.read();
        let command = self.commands.try_recv().ok();
        if command.is_some() {
            // There may be more.
            let _ = self.wake.write(1);
        }
        command
    }

    /// Where the machine is in its life.
    pub fn state(&self) -> VmState {
        locked(&self.known).info.state
    }

    fn set_state(&self, state: VmState) -> StateNow {
        locked(&self.known).info.state = state;
        StateNow { state }
    }

    /// There is a machine.
    pub fn created(&self, resources: &Resources) -> StateNow {
        let config = &resources.config;
        let mut known = locked(&self.known);
        known.config = Some(config.clone());
        known.displays = resources
            .graphics
            .as_ref()
            .map(Graphics::displays)
            .unwrap_or_default();
        known.info = VmInfo {
            state: VmState::Created,
            ending: None,
            cpus: Some(config.cpus),
            memory: Some(config.memory.size.0),
            resets: 0,
        };
        StateNow {
            state: VmState::Created,
        }
    }

    /// The machine's configuration is another.
    pub fn set_config(&self, config: &VmConfig) {
        locked(&self.known).config = Some(config.clone());
    }

    /// The machine is to start, and `reply` waits for that.
    pub fn will_start(&mut self, reply: Reply) {
        self.starting.push(reply);
    }

    /// Whether somebody waits for the machine to start.
    pub fn is_starting(&self) -> bool {
        !self.starting.is_empty()
    }

    /// The machine is to stop, and `reply` waits for that.
    pub fn will_stop(&mut self, reply: Reply) {
        self.stopping.push(reply);
    }

    /// The machine's processors run.
    pub fn started(&mut self) {
        let first = self.state() == VmState::Created;
        let now = self.set_state(VmState::Running);
        self.events.publish(if first {
            EventName::Booted
        } else {
            EventName::Reset
        });
        for reply in self.starting.drain(..) {
            reply.send::<methods::VmBoot>(Ok(now.clone()));
        }
    }

    /// The guest restarts.
    pub fn restarting(&self) {
        locked(&self.known).info.resets += 1;
    }

    /// Processors and clock stand still, or go on.
    pub fn paused(&self, paused: bool) -> StateNow {
        let (state, event) = if paused {
            (VmState::Paused, EventName::Paused)
        } else {
            (VmState::Running, EventName::Resumed)
        };
        let now = self.set_state(state);
        self.events.publish(event);
        now
    }

    /// The machine is gone: answers all that waited for it.
    pub fn ended(&mut self, result: &Result<Ending, LifeError>) {
        let ending = match result {
            Ok(ending) => ending.for_api(),
            Err(_) => VmEnding::Failed,
        };
        self.last_error = result.as_ref().err().map(|error| error_line(error));
        {
            let mut known = locked(&self.known);
            known.info.state = VmState::Stopped;
            known.info.ending = Some(ending);
        }
        self.events.publish_ending(ending);
        for reply in self.starting.drain(..) {
            reply.refuse(match result {
                Err(error) => life_error(error),
                Ok(_) => ApiError::new(ErrorKind::WrongState, "the machine ended"),
            });
        }
        for reply in self.stopping.drain(..) {
            reply.send::<methods::VmStop>(Ok(StateNow {
                state: VmState::Stopped,
            }));
        }
        let ended = self.last_ending(ending);
        for reply in self.waiting.drain(..) {
            reply.send::<methods::VmWait>(Ok(ended.clone()));
        }
    }

    fn last_ending(&self, ending: VmEnding) -> Ended {
        let exit_status = match ending {
            VmEnding::PowerOff => Ending::PowerOff,
            VmEnding::Reset => Ending::Reset,
            VmEnding::Panicked => Ending::Panicked,
            VmEnding::Stopped => Ending::Stopped,
            VmEnding::Failed => Ending::Failed,
        } as u8;
        Ended {
            ending,
            exit_status,
            error: self.last_error.clone(),
        }
    }

    /// The process is to end when the machine has.
    pub fn leave(&mut self) {
        self.leaving = true;
    }

    /// Whether the process is to end.
    pub fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// `vm.wait`.
    pub fn wait(&mut self, reply: Reply) {
        let info = locked(&self.known).info.clone();
        match (info.state, info.ending) {
            (VmState::None, _) => reply.refuse(refusal(
                VmState::None,
                "vm.wait",
                "a machine must have been created",
            )),
            (VmState::Stopped, Some(ending)) => {
                reply.send::<methods::VmWait>(Ok(self.last_ending(ending)));
            }
            _ => {
                if self.waiting.len() >= self.waiting_until_pruned {
                    // Clients that come, wait and go must not pile up.
                    self.waiting.retain(|reply| !reply.is_abandoned());
                    self.waiting_until_pruned = (self.waiting.len() * 2).max(MANY_WAITING);
                }
                self.waiting.push(reply);
            }
        }
    }

    /// Refuses a command that the state forbids.
    pub fn refuse(&self, command: Command) {
        let must = match &command.call {
            Call::VmCreate(_) => "no machine may be there, or it must be stopped",
            Call::VmBoot(_) => "it must be created",
            Call::VmResume(_) => "it must be paused",
            Call::VmPause(_) | Call::VmPowerButton(_) | Call::VmNmi(_) => "it must be running",
            Call::VmStop(_) | Call::ConsoleAttach(_) => "it must be created, running or paused",
            _ => "it must be running or paused",
        };
        let error = refusal(self.state(), command.call.name(), must);
        command.reply.refuse(error);
    }
}

fn refusal(state: VmState, method: &str, must: &str) -> ApiError {
    let is = match state {
        VmState::None => "there is no machine".into(),
        state => format!("the machine is {state}"),
    };
    ApiError::new(ErrorKind::WrongState, format!("{method}: {is}; {must}"))
}

/// A machine's failure as the API tells it.
pub fn life_error(error: &LifeError) -> ApiError {
    let kind = if error.is_bad_input() {
        ErrorKind::BadInput
    } else {
        ErrorKind::HostFailure
    };
    ApiError::new(kind, error_line(error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use fanlight_api::server::{Server, Settings};

    use super::*;

    #[test]
    fn clients_that_wait_and_go_do_not_pile_up() {
        use std::io::Write;
        const CLIENTS: usize = 500;
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings {
            path: dir.path().join("api"),
            allow_uids: vec![],
        };
        let (mut desk, handler) = Desk::new(Box::new(|_| Ok(()))).unwrap();
        let _server = Server::start(&settings, desk.events.clone(), handler).unwrap();
        desk.set_state(VmState::Running);
        let mut waited = 0;
        for _ in 0..CLIENTS {
            let mut client = UnixStream::connect(&settings.path).unwrap();
            let line = b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"vm.wait\"}\n";
            client.write_all(line).unwrap();
            drop(client);
            while let Some(command) = desk.next() {
                desk.wait(command.reply);
                waited += 1;
            }
        }
        while waited < CLIENTS {
            if let Some(command) = desk.next() {
                desk.wait(command.reply);
                waited += 1;
            }
        }
        assert!(
            desk.waiting.len() <= 3 * MANY_WAITING,
            "{}",
            desk.waiting.len()
        );
    }
}
