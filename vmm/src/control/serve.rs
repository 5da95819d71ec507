//! `fanlight serve`: no machine, until the API asks for one.

use std::{io, time::Instant};

use fanlight_api::{VmConfig, methods, methods::Call, types::VmState};
use fanlight_devices::error_line;
use rustix::event::{PollFd, PollFlags, poll};

use crate::{
    control::handlers::{attach, config_error},
    control::queue::{Command, DEFAULT_HOTPLUG_PORTS, Desk},
    control::run_loop,
    host::resources::Resources,
    host::signals::Signals,
    vm::ending::Ending,
    vm::error::LifeError,
};

/// The defaults of a machine that has an API.
pub fn with_api_defaults(mut config: VmConfig) -> VmConfig {
    config.hotplug_ports.get_or_insert(DEFAULT_HOTPLUG_PORTS);
    config
}

/// Creates and runs machines, one after the other, until a signal asks for the end.
pub fn serve(signals: &Signals, desk: &mut Desk) -> Result<Ending, LifeError> {
    let mut created: Option<Resources> = None;
    loop {
        wait(signals, desk).map_err(|source| LifeError::Host {
            action: "wait for events",
            source,
        })?;
        if signals.ask_to_end() {
            return Ok(Ending::PowerOff);
        }
        let Some(command) = desk.next() else { continue };
        let state = desk.state();
        match (&command.call, state) {
            (Call::VmCreate(_), VmState::None | VmState::Stopped) => {
                created = create(command, desk);
            }
            (Call::VmBoot(_), VmState::Created) => {
                let Some(resources) = created.take() else {
                    continue;
                };
                desk.will_start(command.reply);
                let result = run_loop::run(resources, signals, desk, Instant::now());
                if let Err(error) = &result {
                    tracing::error!(error = %error_line(error), "the machine failed");
                }
                if desk.is_leaving() {
                    return result;
                }
            }
            (Call::VmStop(_), VmState::Created) => {
                created = None;
                desk.will_stop(command.reply);
                desk.ended(&Ok(Ending::Stopped));
            }
            (Call::ConsoleAttach(which), VmState::Created) => {
                let console = created.as_mut().and_then(|resources| match which.console {
                    fanlight_api::types::ConsoleName::Serial => Some(&mut resources.serial),
                    fanlight_api::types::ConsoleName::Console => resources.console.as_mut(),
                });
                attach(console.map(|console| &mut console.input), command.reply);
            }
            (Call::VmWait(_), _) => desk.wait(command.reply),
            _ => desk.refuse(command),
        }
    }
}

fn create(command: Command, desk: &Desk) -> Option<Resources> {
    let Call::VmCreate(config) = command.call else {
        return None;
    };
    match Resources::open(with_api_defaults(config), &command.descriptors) {
        Ok(resources) => {
            let now = desk.created(&resources);
            command.reply.send::<methods::VmCreate>(Ok(now));
            Some(resources)
        }
        Err(error) => {
            command.reply.refuse(config_error(&error, String::new()));
            None
        }
    }
}

/// Waits for a signal or a command.
fn wait(signals: &Signals, desk: &Desk) -> io::Result<()> {
    let mut fds = [
        PollFd::new(signals, PollFlags::IN),
        PollFd::new(desk, PollFlags::IN),
    ];
    match poll(&mut fds, None) {
        Err(rustix::io::Errno::INTR) => Ok(()),
        result => Ok(result.map(drop)?),
    }
}
