//! The part of the i8042 keyboard controller that restarts a PC: command 0xFE pulses the CPU's
//! reset line. There is no keyboard behind it, and the ACPI tables say so.

use std::convert::Infallible;

use vm_superio::{I8042Device, Trigger};

use super::guest_request::{GuestRequest, RequestSink};
use crate::{memory::IoHandler, sync::Mutex};

/// Ports 0x60 to 0x64.
pub struct I8042(Mutex<I8042Device<ResetLine>>);

/// How many ports the device answers.
pub const PORTS: u64 = 5;

struct ResetLine(RequestSink);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        (self.0)(GuestRequest::Reset);
        Ok(())
    }
}

impl I8042 {
    /// A controller that asks `requests` for a reset.
    pub fn new(requests: RequestSink) -> Self {
        Self(Mutex::new(I8042Device::new(ResetLine(requests))))
    }
}

impl IoHandler for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let ([byte], Ok(port)) = (data, u8::try_from(offset)) {
            *byte = self.0.lock().read(port);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (&[byte], Ok(port)) = (data, u8::try_from(offset)) {
            let Ok(()) = self.0.lock().write(port, byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::test_util::requests;

    #[test]
    fn command_fe_asks_for_a_reset() {
        let (sink, seen) = requests();
        let device = I8042::new(sink);
        device.write(4, &[0xaa]);
        device.write(4, &[0xfe, 0xfe]);
        assert!(seen.lock().is_empty());
        device.write(4, &[0xfe]);
        assert_eq!(*seen.lock(), [GuestRequest::Reset]);
    }
}
