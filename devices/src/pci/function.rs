//! A PCI function, and what it is made from.

use std::{fmt, sync::Arc};

use super::bar::BarKind;
use crate::{GuestMemory, hypervisor::Hypervisor, memory::AddressSpace};

/// Place of a function on its bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DevFn(pub u8);

impl DevFn {
    /// From a device number below 32 and a function number below 8.
    pub const fn new(device: u8, function: u8) -> Self {
        Self(device << 3 | function & 7)
    }

    /// The device number, below 32.
    pub const fn device(self) -> u8 {
        self.0 >> 3
    }
}

impl fmt::Display for DevFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{}", self.0 >> 3, self.0 & 7)
    }
}

/// A PCI function as its bus sees it. Calls come from vCPU threads.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space. `offset` is below 4096, `data` 1, 2 or 4 bytes that do not cross a
    /// double word.
    fn read_config(&self, offset: u16, data: &mut [u8]);

    /// Writes configuration space, with the same bounds.
    fn write_config(&self, offset: u16, data: &[u8]);

    /// The BARs to find a place for: register index, kind and size in bytes.
    fn bars(&self) -> Vec<(usize, BarKind, u64)>;

    /// Puts a BAR at an address. For the machine, before the guest runs.
    fn place_bar(&self, index: usize, address: u64);

    /// Conventional Reset (PCI Express 5.0, 6.6.1): nothing is decoded, no interrupt is raised, no thread works for
    /// it. A function that cannot be put into a slot need not do anything.
    fn reset(&self) {}
}

/// The parts of the machine that a function uses.
#[derive(Clone)]
pub struct FunctionContext {
    /// Interrupts and doorbells.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Guest RAM.
    pub mem: GuestMemory,
    /// Map of guest-physical addresses.
    pub memory: Arc<AddressSpace>,
    /// Map of ports.
    pub ports: Arc<AddressSpace>,
}
