//! The virtio console. Its backend is opened here; the main loop reads the backend's input.

use std::io;

use fanlight_api::{CharBackend, ConsoleConfig};
use fanlight_devices::{legacy::output::Output, virtio::console::Console};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{CLASS_COMMUNICATION_OTHER, Device, Failure, Kind, Life, Opened, Opening};
use crate::{
    host::console::{ConsoleError, HostConsole},
    vm::{
        fault::{Classify, Fault},
        function::Function,
        guest_console::GuestConsole,
    },
};

/// The virtio console; at most one.
pub static KIND: Kind = Kind {
    field: "console",
    title: "virtio console",
    open,
    hotplug: None,
};

struct VirtioConsole {
    output: Output,
}

/// Why there is no virtio console.
#[derive(Debug, Error)]
enum OpenError {
    /// Both consoles use the terminal.
    #[error(
        "the serial port uses stdio already: give one of them another backend, such as null for the serial port"
    )]
    StdioTwice,
    /// The backend.
    #[error(transparent)]
    Backend(#[from] ConsoleError),
}

impl Classify for OpenError {
    fn fault(&self) -> Fault {
        match self {
            Self::StdioTwice => Fault::Input,
            Self::Backend(error) => error.fault(),
        }
    }
}

impl Classify for ConsoleError {
    fn fault(&self) -> Fault {
        match self {
            ConsoleError::File { .. } | ConsoleError::Socket { .. } => Fault::Input,
            ConsoleError::Host(_) => Fault::Host,
        }
    }
}

/// The host has no descriptor left.
#[derive(Debug, Error)]
#[error("cannot make an event descriptor")]
struct EventError(#[from] io::Error);

impl Classify for EventError {
    fn fault(&self) -> Fault {
        Fault::Host
    }
}

fn open(opening: &mut Opening) -> Opened {
    let serial = &opening.config.serial;
    let host = &mut opening.console;
    KIND.open_each(
        &opening.config.console,
        |_| None,
        |ConsoleConfig(backend)| {
            if (serial, backend) == (&CharBackend::Stdio, &CharBackend::Stdio) {
                return Err(OpenError::StdioTwice.into());
            }
            let opened = HostConsole::open("console", backend).map_err(OpenError::Backend)?;
            let output = opened.output.clone();
            *host = Some(opened);
            Ok(VirtioConsole { output })
        },
    )
}

impl VirtioConsole {
    fn device(&self) -> Result<(Console, GuestConsole), EventError> {
        let room = EventFd::new(EFD_NONBLOCK)?;
        let (device, handle) = Console::new(self.output.clone(), room.try_clone()?)?;
        let resized = handle.clone();
        let guest = GuestConsole {
            give: Box::new(move |bytes| handle.input(bytes)),
            resize: Box::new(move |columns, rows| resized.resize(columns, rows)),
            room,
        };
        Ok((device, guest))
    }
}

impl Device for VirtioConsole {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn id(&self) -> &str {
        "console"
    }

    fn build(&self, life: &mut Life) -> Result<Function, Failure> {
        let (device, guest) = self.device()?;
        life.consoles.push(guest);
        life.virtio(Box::new(device), CLASS_COMMUNICATION_OTHER)
    }
}
