//! How a machine's life can end, and the process's exit status for each way.

use std::process::ExitCode;

use fanlight_api::types::VmEnding;

/// How the machine ended. The numbers are part of the command line's interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Ending {
    /// The guest powered itself off.
    PowerOff = 0,
    /// Fanlight could not go on.
    Failed = 1,
    /// What the user asked for makes no machine; nothing was started.
    BadInput = 2,
    /// The guest asked for a reset, and `--on-reset exit` was given.
    Reset = 32,
    /// The guest's kernel panicked.
    Panicked = 33,
    /// The user ended the machine without the guest's consent.
    Stopped = 34,
}

impl Ending {
    /// The same for the API.
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
