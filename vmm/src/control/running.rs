//! A running machine with all that its calls and its main loop change.

use std::collections::BTreeSet;

use fanlight_devices::{error_line, memory::GuestRam};

use crate::{
    control::{console_input::ConsoleInput, queue::ControlQueue},
    vm::ending::Ending,
    vm::error::RunError,
    vm::machine::Machine,
    vm::resources::HotplugState,
};

/// How a machine stops running.
#[derive(Debug)]
pub enum Outcome {
    /// It ends.
    End(Ending),
    /// It starts again.
    Restart,
    /// It cannot go on.
    Failed(RunError),
}

/// A machine between its start and its end or reset.
pub struct RunningMachine<'a> {
    /// vCPUs and devices.
    pub machine: Machine,
    /// The host side of its devices, and its configuration.
    pub hotplug: &'a mut HotplugState,
    /// Guest RAM.
    pub ram: &'a GuestRam,
    /// Where its calls come from.
    pub queue: &'a mut ControlQueue,
    /// Its consoles: the serial port, and the virtio console if there is one.
    pub inputs: Vec<ConsoleInput<'a>>,
    /// Passed-through devices that the host wants back and the guest was asked for.
    pub requested: BTreeSet<String>,
    /// Set when it is to stop running.
    pub outcome: Option<Outcome>,
}

impl RunningMachine<'_> {
    /// Stops it. The first outcome counts.
    pub fn end(&mut self, outcome: Outcome) {
        self.outcome.get_or_insert(outcome);
    }

    /// Resumes a paused guest that is to shut down.
    pub fn resume_silently(&mut self) {
        match self.machine.processors.resume() {
            Ok(()) => {
                self.queue.paused(false);
            }
            Err(error) => tracing::error!(error = %error_line(&error), "cannot resume the guest"),
        }
    }
}
