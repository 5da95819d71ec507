//! An interrupt line for the devices of vm-superio.

use std::io;

use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

/// An interrupt line as vm-superio's devices raise it.
#[derive(Debug)]
pub struct InterruptLine(EventFd);

impl InterruptLine {
    /// `event` is one edge a write, as [`crate::hypervisor::Hypervisor::irq_line`] gives it.
    pub fn new(event: EventFd) -> Self {
        Self(event)
    }
}

impl Trigger for InterruptLine {
    type E = io::Error;

    fn trigger(&self) -> Result<(), io::Error> {
        self.0.write(1)
    }
}
