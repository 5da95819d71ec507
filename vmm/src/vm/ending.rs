//! How a machine can end, and the exit status of the process for each way.

use std::process::ExitCode;

use fanlight_api::types::VmEnding;

/// How the machine ended. The numbers are exit statuses of the command line, and stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Ending {
    /// The guest powered itself off.
    PowerOff = 0,
    /// Fanlight could not go on.
    Failed = 1,
    /// The configuration makes no machine on this host; nothing was started.
    BadInput = 2,
    /// The guest asked for a reset, and the configuration has `on_reset: exit`.
    Reset = 32,
    /// The guest's kernel panicked.
    Panicked = 33,
    /// The machine was stopped from outside, without a shutdown of the guest.
    Stopped = 34,
}

impl Ending {
    /// The same in the API.
    pub fn for_api(self) -> VmEnding {
        match self {
            Ending::PowerOff => VmEnding::PowerOff,
            Ending::Reset => VmEnding::Reset,
            Ending::Panicked => VmEnding::Panicked,
            Ending::Stopped => VmEnding::Stopped,
            Ending::Failed | Ending::BadInput => VmEnding::Failed,
        }
    }
}

impl From<Ending> for ExitCode {
    fn from(ending: Ending) -> Self {
        ExitCode::from(ending as u8)
    }
}
