//! Calls for the main thread, and the clients that wait for the machine to start, stop or end.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::{
        Arc,
        mpsc::{self, Receiver},
    },
};

use fanlight_api::{
    methods::{self, MachineCall},
    server::{Events, Handler, Reply},
    types::{Ended, EventName, StateNow, VmEnding, VmState},
};
use fanlight_devices::error_line;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    control::{
        errors,
        requests::{Command, RequestHandler, SetLog},
        status::VmStatus,
    },
    display::{api::Display, input::Inputs},
    vm::devices::{Devices, gpu::Gpu, input},
    vm::ending::Ending,
    vm::error::RunError,
    vm::resources::Resources,
};

/// Replies to `vm.wait` that are kept before those of clients that have gone are dropped.
const MANY_WAITING: usize = 64;

/// The main thread's side of the API. Readable when a command has come.
pub struct ControlQueue {
    commands: Receiver<Command>,
    wake: EventFd,
    status: VmStatus,
    /// Where events are published.
    pub events: Events,
    /// `vm.boot` and `vm.reset` that are under way.
    starting: Vec<Reply>,
    /// `vm.stop` that is under way.
    stopping: Vec<Reply>,
    /// `vm.wait`.
    waiting: Vec<Reply>,
    /// At this length, `waiting` loses those whose clients have gone.
    waiting_until_pruned: usize,
    last_error: Option<String>,
    /// The process is to end when the machine has.
    leaving: bool,
}

impl AsFd for ControlQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd stays open as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.wake.as_raw_fd()) }
    }
}

impl ControlQueue {
    /// A queue, and the handler that the server fills it with.
    pub fn new(set_log: SetLog) -> io::Result<(Self, Arc<dyn Handler>)> {
        let (sender, commands) = mpsc::channel();
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let status = VmStatus::default();
        let handler = RequestHandler {
            commands: sender,
            wake: wake.try_clone()?,
            status: status.clone(),
            set_log,
        };
        let queue = Self {
            commands,
            wake,
            status,
            events: Events::default(),
            starting: Vec::new(),
            stopping: Vec::new(),
            waiting: Vec::new(),
            waiting_until_pruned: MANY_WAITING,
            last_error: None,
            leaving: false,
        };
        Ok((queue, Arc::new(handler)))
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
        self.status.state()
    }

    fn set_state(&self, state: VmState) -> StateNow {
        self.status.set_state(state);
        StateNow { state }
    }

    /// A machine was created of `resources`.
    pub fn created(&self, resources: &Resources) -> StateNow {
        let displays = displays(&resources.hotplug.devices);
        self.status.set_created(resources.config(), displays);
        StateNow {
            state: VmState::Created,
        }
    }

    /// The machine's configuration changed.
    pub fn set_config(&self, config: &fanlight_api::VmConfig) {
        self.status.set_config(config);
    }

    /// The machine is to start; `reply` is sent when it runs.
    pub fn will_start(&mut self, reply: Reply) {
        self.starting.push(reply);
    }

    /// Whether a client asked for the start that is under way.
    pub fn is_starting(&self) -> bool {
        !self.starting.is_empty()
    }

    /// The machine is to stop; `reply` is sent when it has.
    pub fn will_stop(&mut self, reply: Reply) {
        self.stopping.push(reply);
    }

    /// The vCPUs run.
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
        self.status.count_reset();
    }

    /// The vCPUs and the guest's clock were stopped, or resumed.
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

    /// The machine ended: answers all calls that waited for that.
    pub fn ended(&mut self, result: &Result<Ending, RunError>) {
        let ending = match result {
            Ok(ending) => ending.for_api(),
            Err(_) => VmEnding::Failed,
        };
        self.last_error = result.as_ref().err().map(|error| error_line(error));
        self.status.set_ended(ending);
        self.events.publish_ending(ending);
        for reply in self.starting.drain(..) {
            reply.refuse(match result {
                Err(error) => errors::run(error),
                Ok(_) => errors::ended_before_start(),
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
        let info = self.status.info();
        match (info.state, info.ending) {
            (VmState::None, _) => reply.refuse(errors::no_machine("vm.wait")),
            (VmState::Stopped, Some(ending)) => {
                reply.send::<methods::VmWait>(Ok(self.last_ending(ending)));
            }
            _ => {
                if self.waiting.len() >= self.waiting_until_pruned {
                    // Clients that connect, wait and go must not pile up.
                    self.waiting.retain(|reply| !reply.is_abandoned());
                    self.waiting_until_pruned = (self.waiting.len() * 2).max(MANY_WAITING);
                }
                self.waiting.push(reply);
            }
        }
    }

    /// Refuses a call that the state forbids.
    pub fn refuse(&self, call: &MachineCall, reply: Reply) {
        reply.refuse(errors::forbidden(call, self.state()));
    }
}

/// The display of each GPU, with the input devices that all share.
fn displays(devices: &Devices) -> Vec<Display> {
    let Some(inputs) = input::handles(devices) else {
        return Vec::new();
    };
    let display = |gpu: &Gpu| {
        let handle = gpu.display().clone();
        let inputs = Inputs::new(handle.clone(), inputs.clone());
        Display::new(handle, inputs)
    };
    devices.of().map(display).collect()
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
        let (mut queue, handler) = ControlQueue::new(Box::new(|_| Ok(()))).unwrap();
        let _server = Server::start(&settings, queue.events.clone(), handler).unwrap();
        queue.set_state(VmState::Running);
        let mut waited = 0;
        for _ in 0..CLIENTS {
            let mut client = UnixStream::connect(&settings.path).unwrap();
            let line = b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"vm.wait\"}\n";
            client.write_all(line).unwrap();
            drop(client);
            while let Some(command) = queue.next() {
                queue.wait(command.reply);
                waited += 1;
            }
        }
        while waited < CLIENTS {
            if let Some(command) = queue.next() {
                queue.wait(command.reply);
                waited += 1;
            }
        }
        assert!(
            queue.waiting.len() <= 3 * MANY_WAITING,
            "{}",
            queue.waiting.len()
        );
    }
}
