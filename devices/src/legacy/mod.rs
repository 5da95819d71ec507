//! The few devices of a PC that are not on PCI: serial port, clock, i8042 reset, pvpanic and the
//! registers of hardware-reduced ACPI.

pub mod i8042;
pub mod output;
pub mod power;
pub mod pvpanic;
pub mod rtc;
pub mod serial;

use std::{io, sync::Arc};

use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

/// What the guest asks the machine for through a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestRequest {
    /// Soft off (S5).
    PowerOff,
    /// A restart.
    Reset,
    /// The guest's kernel panicked and will not go on.
    Panicked,
    /// The guest's kernel panicked and boots its crash kernel.
    CrashLoaded,
}

/// Takes the guest's requests, on a vCPU thread; must not block.
pub type RequestSink = Arc<dyn Fn(GuestRequest) + Send + Sync>;

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

#[cfg(test)]
pub(crate) mod test_util {
    use crate::sync::Mutex;

    use super::*;

    /// A sink and what it took.
    pub fn requests() -> (RequestSink, Arc<Mutex<Vec<GuestRequest>>>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = {
            let seen = seen.clone();
            Arc::new(move |request| seen.lock().push(request))
        };
        (sink, seen)
    }
}
