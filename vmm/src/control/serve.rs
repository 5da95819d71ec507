//! `fanlight serve`: no machine until `vm.create` asks for one.

use std::{io, time::Instant};

use fanlight_api::{
    VmConfig,
    methods::{self, MachineCall},
    server::Reply,
    socket::Descriptors,
    types::{ConsoleName, VmState},
};
use fanlight_devices::error_line;
use rustix::event::{PollFd, PollFlags, poll};

use crate::{
    control::{errors, handlers::attach, queue::ControlQueue, requests::Command, run_loop},
    host::signals::Signals,
    vm::ending::Ending,
    vm::error::RunError,
    vm::resources::Resources,
};

/// Empty root ports of a machine with an API whose configuration has no `hotplug_ports`.
pub const DEFAULT_HOTPLUG_PORTS: u8 = 4;

/// Fills in the defaults of a machine with an API.
pub fn with_api_defaults(mut config: VmConfig) -> VmConfig {
    config.hotplug_ports.get_or_insert(DEFAULT_HOTPLUG_PORTS);
    config
}

/// Creates and runs machines, one after the other, until a signal asks the process to end.
pub fn serve(signals: &Signals, queue: &mut ControlQueue) -> Result<Ending, RunError> {
    let mut created: Option<Resources> = None;
    loop {
        wait(signals, queue).map_err(|source| RunError::Host {
            action: "wait for events",
            source,
        })?;
        if signals.ask_to_end() {
            return Ok(Ending::PowerOff);
        }
        let Some(command) = queue.next() else {
            continue;
        };
        let Command {
            call,
            descriptors,
            reply,
        } = command;
        let state = queue.state();
        match call {
            MachineCall::VmCreate(config) if matches!(state, VmState::None | VmState::Stopped) => {
                created = create(config, &descriptors, reply, queue);
            }
            MachineCall::VmBoot(_) if state == VmState::Created => {
                let Some(resources) = created.take() else {
                    continue;
                };
                queue.will_start(reply);
                let result = run_loop::run(resources, signals, queue, Instant::now());
                if let Err(error) = &result {
                    tracing::error!(error = %error_line(error), "the machine failed");
                }
                if queue.is_leaving() {
                    return result;
                }
            }
            MachineCall::VmStop(_) if state == VmState::Created => {
                created = None;
                queue.will_stop(reply);
                queue.ended(&Ok(Ending::Stopped));
            }
            MachineCall::ConsoleAttach(params) if state == VmState::Created => {
                let console = created.as_mut().and_then(|resources| match params.console {
                    ConsoleName::Serial => Some(&mut resources.consoles.serial),
                    ConsoleName::Console => resources.consoles.virtio.as_mut(),
                });
                attach(console.map(|console| &mut console.input), reply);
            }
            MachineCall::VmWait(_) => queue.wait(reply),
            MachineCall::VmCreate(_)
            | MachineCall::VmBoot(_)
            | MachineCall::VmStop(_)
            | MachineCall::ConsoleAttach(_)
            | MachineCall::VmPause(_)
            | MachineCall::VmResume(_)
            | MachineCall::VmPowerButton(_)
            | MachineCall::VmNmi(_)
            | MachineCall::VmReset(_)
            | MachineCall::VmStats(_)
            | MachineCall::DeviceList(_)
            | MachineCall::DeviceAdd(_)
            | MachineCall::DeviceRemove(_)
            | MachineCall::DiskResize(_) => queue.refuse(&call, reply),
        }
    }
}

/// Opens what a machine uses of the host.
fn create(
    config: VmConfig,
    descriptors: &Descriptors,
    reply: Reply,
    queue: &ControlQueue,
) -> Option<Resources> {
    match Resources::open(with_api_defaults(config), descriptors) {
        Ok(resources) => {
            let now = queue.created(&resources);
            reply.send::<methods::VmCreate>(Ok(now));
            Some(resources)
        }
        Err(error) => {
            reply.refuse(errors::open(&error));
            None
        }
    }
}

/// Waits for a signal or a command.
fn wait(signals: &Signals, queue: &ControlQueue) -> io::Result<()> {
    let mut fds = [
        PollFd::new(signals, PollFlags::IN),
        PollFd::new(queue, PollFlags::IN),
    ];
    match poll(&mut fds, None) {
        Err(rustix::io::Errno::INTR) => Ok(()),
        result => Ok(result.map(drop)?),
    }
}
