//! Why a machine does not come to be, or does not go on.

use std::{io, time::Duration};

use fanlight_arch::{acpi::AcpiError, boot::LoadError, cpuid::CpuidError};
use fanlight_devices::{
    memory::{AddressSpaceError, RamError},
    pci::PciError,
    vfio::VfioError,
};
use thiserror::Error;
use vm_memory::GuestMemoryError;

use crate::{
    kvm::{KvmError, VcpuError},
    vm::{
        devices::DeviceError,
        fault::{Classify, Fault},
        pci_topology::TopologyError,
    },
};

/// Why there is no machine.
#[derive(Debug, Error)]
pub enum MachineError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The kernel, the initial RAM disk or the command line.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The place of a device.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// Addresses for devices.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// Guest RAM cannot be mapped for passed-through devices.
    #[error("passed-through devices")]
    Dma(#[from] VfioError),
    /// Guest memory.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// Two things at one address: a bug in Fanlight.
    #[error("the machine's address map is wrong")]
    Map(#[from] AddressSpaceError),
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// CPUID.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// Guest memory could not be written.
    #[error("cannot write the first vCPU's tables")]
    Memory(#[from] GuestMemoryError),
    /// A system call failed.
    #[error("cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl MachineError {
    /// Names what was tried when a system call failed.
    pub(super) fn host(action: &'static str) -> impl Fn(io::Error) -> Self + Copy {
        move |source| Self::Host { action, source }
    }

    /// The field of the configuration that the error is about, if it is about one. Its option of the command line has
    /// the same name.
    pub fn field(&self) -> Option<&'static str> {
        match self {
            Self::Kvm(KvmError::Cpus { .. }) => Some("cpus"),
            Self::Kvm(_) => None,
            Self::Load(error) => match error {
                LoadError::CmdlineTooLong { .. } | LoadError::CmdlineNotAscii => Some("cmdline"),
                LoadError::TooLarge { .. } => Some("memory"),
                LoadError::NotAKernel(_)
                | LoadError::BadKernel { .. }
                | LoadError::Truncated { .. } => Some("kernel"),
                LoadError::Read { .. } | LoadError::Memory(_) => None,
            },
            Self::Device(error) => Some(error.field),
            Self::Dma(_) => Some("vfio"),
            Self::Ram(_) => Some("memory"),
            Self::Topology(_)
            | Self::Pci(_)
            | Self::Map(_)
            | Self::Acpi(_)
            | Self::Cpuid(_)
            | Self::Memory(_)
            | Self::Host { .. } => None,
        }
    }
}

impl Classify for MachineError {
    fn fault(&self) -> Fault {
        match self {
            Self::Kvm(error) => error.fault(),
            Self::Load(error) => error.fault(),
            Self::Device(error) => error.fault(),
            Self::Topology(error) => error.fault(),
            Self::Pci(error) => error.fault(),
            Self::Dma(error) => error.fault(),
            Self::Ram(error) => error.fault(),
            Self::Map(error) => error.fault(),
            Self::Acpi(error) => error.fault(),
            Self::Cpuid(error) => error.fault(),
            Self::Memory(error) => error.fault(),
            Self::Host { .. } => Fault::Host,
        }
    }
}

/// Why a machine's run ended badly.
#[derive(Debug, Error)]
pub enum RunError {
    /// The machine could not be built, paused or resumed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A vCPU failed.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The guest restarts again and again.
    #[error(
        "the guest restarted {times} times within {within:?} each: look at its console for why, or set on_reset to \
         exit, which stops at the first restart"
    )]
    RestartLoop {
        /// Restarts in a row.
        times: u32,
        /// The longest that one of them took.
        within: Duration,
    },
    /// A system call failed.
    #[error("cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl RunError {
    /// The field of the configuration that the error is about, if it is about one.
    pub fn field(&self) -> Option<&'static str> {
        match self {
            Self::Machine(error) => error.field(),
            Self::RestartLoop { .. } => Some("on_reset"),
            Self::Vcpu(_) | Self::Host { .. } => None,
        }
    }
}

impl Classify for RunError {
    fn fault(&self) -> Fault {
        match self {
            Self::Machine(error) => error.fault(),
            Self::Vcpu(error) => error.fault(),
            Self::RestartLoop { .. } => Fault::Guest,
            Self::Host { .. } => Fault::Host,
        }
    }
}

#[cfg(test)]
mod tests {
    use fanlight_devices::pci::SlotError;

    use super::*;

    fn host() -> io::Error {
        io::ErrorKind::OutOfMemory.into()
    }

    #[test]
    fn an_error_keeps_who_is_at_fault_on_its_way_up() {
        let cases = [
            (MachineError::from(KvmError::Missing), Fault::Input),
            (MachineError::from(PciError::Full), Fault::Input),
            (MachineError::from(TopologyError::NoSlot), Fault::Input),
            (TopologyError::from(SlotError::Busy(1)).into(), Fault::Guest),
            (TopologyError::Interrupt(host()).into(), Fault::Host),
            (
                MachineError::from(VfioError::UnsafeInterrupts),
                Fault::Input,
            ),
            (
                MachineError::from(VfioError::NotAContainer),
                Fault::Descriptor,
            ),
            (MachineError::from(AcpiError::TooLarge), Fault::Host),
            (
                MachineError::host("start a vCPU thread")(host()),
                Fault::Host,
            ),
        ];
        for (error, fault) in cases {
            assert_eq!(error.fault(), fault, "{error}");
            assert_eq!(RunError::from(error).fault(), fault);
        }
    }

    #[test]
    fn failures_of_a_running_machine_are_not_bad_input() {
        let within = Duration::from_secs(1);
        let restarts = RunError::RestartLoop { times: 5, within };
        assert_eq!(restarts.fault(), Fault::Guest);
        let waiting = RunError::Host {
            action: "wait for events",
            source: host(),
        };
        assert!(!waiting.fault().is_bad_input());
    }

    #[test]
    fn an_error_names_its_field() {
        let cpus = KvmError::Cpus { asked: 0, max: 8 };
        assert_eq!(MachineError::from(cpus).field(), Some("cpus"));
        let cmdline = MachineError::from(LoadError::CmdlineNotAscii);
        assert_eq!(RunError::from(cmdline).field(), Some("cmdline"));
        assert_eq!(MachineError::from(PciError::Full).field(), None);
    }
}
