//! Why a machine's life ended badly.

use std::{io, time::Duration};

use thiserror::Error;

use crate::{
    kvm::{VcpuError, processor_virtualizes},
    vm::machine::MachineError,
};

/// Why a machine's life ended badly.
#[derive(Debug, Error)]
pub enum LifeError {
    /// The machine could not be built.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A vCPU failed.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The guest restarts and restarts.
    #[error(
        "the guest restarted {times} times within {within:?} each: look at its console for why, or stop at the \
         first restart with --on-reset exit"
    )]
    RestartLoop {
        /// Restarts in a row.
        times: u32,
        /// The longest that one of them took.
        within: Duration,
    },
    /// Something of the host's failed.
    #[error("cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl LifeError {
    /// Whether what the user asked for cannot be on this host, rather than that something failed.
    pub fn is_bad_input(&self) -> bool {
        match self {
            LifeError::Machine(error) => error.is_bad_input(),
            LifeError::Vcpu(VcpuError::Emulation { .. }) => !processor_virtualizes(),
            _ => false,
        }
    }
}
