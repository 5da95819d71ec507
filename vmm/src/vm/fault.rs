//! The party at fault for an error, which decides the exit status and the API's error kind.
//!
//! Every implementation of [`Classify`] matches all variants: a new variant does not compile until it is sorted.
//! Errors of one kind of device are sorted in the file of that kind, all others here.

use fanlight_api::ApiError;
use fanlight_arch::{acpi::AcpiError, boot::LoadError, cpuid::CpuidError};
use fanlight_devices::{
    memory::{AddressSpaceError, RamError},
    pci::{MsixError, PciError, SlotError},
};
use thiserror::Error;
use vm_memory::GuestMemoryError;

use crate::kvm::{KvmError, VcpuError, processor_virtualizes};

/// The party at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The configuration: this host cannot provide it. Nothing was started (exit status 2).
    Input,
    /// A descriptor in the configuration (exit status 2).
    Descriptor,
    /// The host, or a bug in Fanlight (exit status 1).
    Host,
    /// The guest (exit status 1).
    Guest,
}

impl Fault {
    /// Whether this host cannot provide the configuration.
    pub fn is_bad_input(self) -> bool {
        match self {
            Fault::Input | Fault::Descriptor => true,
            Fault::Host | Fault::Guest => false,
        }
    }
}

/// An error with a party at fault.
pub trait Classify: std::error::Error {
    /// The party at fault.
    fn fault(&self) -> Fault;
}

/// A descriptor that is missing or named twice.
#[derive(Debug, Error)]
#[error(transparent)]
pub struct BadDescriptor(pub ApiError);

impl Classify for BadDescriptor {
    fn fault(&self) -> Fault {
        Fault::Descriptor
    }
}

impl Classify for KvmError {
    fn fault(&self) -> Fault {
        match self {
            KvmError::Missing
            | KvmError::Permission
            | KvmError::NotKvm
            | KvmError::Version(_)
            | KvmError::Capability(_)
            | KvmError::Cpus { .. } => Fault::Input,
            KvmError::Ioctl { .. } => Fault::Host,
        }
    }
}

impl Classify for VcpuError {
    fn fault(&self) -> Fault {
        match self {
            // A paravirtual KVM cannot run a stock kernel at all.
            VcpuError::Emulation { .. } if !processor_virtualizes() => Fault::Input,
            VcpuError::Emulation { .. } | VcpuError::Entry(_) => Fault::Guest,
            VcpuError::Internal { .. } | VcpuError::Unexpected(_) | VcpuError::Run(_) => {
                Fault::Host
            }
        }
    }
}

impl Classify for LoadError {
    fn fault(&self) -> Fault {
        match self {
            LoadError::NotAKernel(_)
            | LoadError::BadKernel { .. }
            | LoadError::Truncated { .. }
            | LoadError::TooLarge { .. }
            | LoadError::CmdlineTooLong { .. }
            | LoadError::CmdlineNotAscii => Fault::Input,
            LoadError::Read { .. } | LoadError::Memory(_) => Fault::Host,
        }
    }
}

impl Classify for RamError {
    fn fault(&self) -> Fault {
        match self {
            RamError::BadSize { .. } | RamError::TooLarge { .. } | RamError::NoHugePages { .. } => {
                Fault::Input
            }
            RamError::Host { .. } | RamError::Map(_) => Fault::Host,
        }
    }
}

impl Classify for PciError {
    fn fault(&self) -> Fault {
        match self {
            PciError::Full | PciError::TooManyBuses | PciError::NoRoom { .. } => Fault::Input,
        }
    }
}

impl Classify for SlotError {
    fn fault(&self) -> Fault {
        match self {
            SlotError::Occupied(_) | SlotError::Empty(_) => Fault::Input,
            SlotError::Busy(_) => Fault::Guest,
        }
    }
}

impl Classify for MsixError {
    fn fault(&self) -> Fault {
        match self {
            MsixError::Count(_) | MsixError::Vector { .. } => Fault::Host,
        }
    }
}

/// Two things at one address: a bug.
impl Classify for AddressSpaceError {
    fn fault(&self) -> Fault {
        Fault::Host
    }
}

/// The tables outgrow their area, or memory cannot be written: a bug.
impl Classify for AcpiError {
    fn fault(&self) -> Fault {
        Fault::Host
    }
}

/// KVM describes a processor that no guest can have.
impl Classify for CpuidError {
    fn fault(&self) -> Fault {
        Fault::Host
    }
}

/// Guest RAM cannot be written where it must lie: a bug.
impl Classify for GuestMemoryError {
    fn fault(&self) -> Fault {
        Fault::Host
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn host() -> io::Error {
        io::ErrorKind::OutOfMemory.into()
    }

    #[test]
    fn what_the_host_lacks_is_bad_input_and_what_it_fails_at_is_not() {
        assert_eq!(KvmError::Missing.fault(), Fault::Input);
        assert_eq!(KvmError::Cpus { asked: 9, max: 8 }.fault(), Fault::Input);
        let ioctl = KvmError::Ioctl {
            action: "create a vCPU",
            source: host(),
        };
        assert_eq!(ioctl.fault(), Fault::Host);
        let ram = RamError::TooLarge {
            size: 2 << 40,
            host: 1 << 30,
        };
        assert_eq!(ram.fault(), Fault::Input);
        let map = RamError::Host {
            action: "map it",
            size: 1 << 30,
            source: host(),
        };
        assert_eq!(map.fault(), Fault::Host);
    }

    #[test]
    fn a_kernel_that_is_none_is_bad_input_and_one_that_cannot_be_read_is_not() {
        assert_eq!(LoadError::NotAKernel("a".into()).fault(), Fault::Input);
        let read = LoadError::Read {
            path: "a".into(),
            source: host(),
        };
        assert_eq!(read.fault(), Fault::Host);
    }

    #[test]
    fn vcpus_fail_for_the_guest_or_the_host() {
        assert_eq!(VcpuError::Entry(7).fault(), Fault::Guest);
        assert_eq!(VcpuError::Run(host()).fault(), Fault::Host);
        let emulation = VcpuError::Emulation { rip: 0 }.fault();
        assert_eq!(emulation.is_bad_input(), !processor_virtualizes());
    }

    #[test]
    fn only_input_and_descriptors_are_bad_input() {
        let bad =
            [Fault::Input, Fault::Descriptor, Fault::Host, Fault::Guest].map(Fault::is_bad_input);
        assert_eq!(bad, [true, true, false, false]);
    }
}
