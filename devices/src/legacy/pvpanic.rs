//! pvpanic: the guest's kernel says that it panicked (QEMU `docs/specs/pvpanic`).

use super::{GuestRequest, RequestSink};
use crate::memory::IoHandler;

/// The guest panicked and stops.
const PANICKED: u8 = 1 << 0;
/// The guest panicked and goes on in its crash kernel.
const CRASH_LOADED: u8 = 1 << 1;

/// The event register: reads tell the events that are supported, writes report one.
pub struct PvPanic(RequestSink);

impl PvPanic {
    /// A device that reports to `requests`.
    pub fn new(requests: RequestSink) -> Self {
        Self(requests)
    }
}

impl IoHandler for PvPanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        if let Some(byte) = data.first_mut() {
            *byte = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        match data.first() {
            Some(byte) if byte & PANICKED != 0 => (self.0)(GuestRequest::Panicked),
            Some(byte) if byte & CRASH_LOADED != 0 => (self.0)(GuestRequest::CrashLoaded),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::test_util::requests;

    #[test]
    fn reports_what_it_says_it_supports() {
        let (sink, seen) = requests();
        let device = PvPanic::new(sink);
        let mut byte = [0];
        device.read(0, &mut byte);
        device.write(0, &[4]);
        device.write(0, &[byte[0] & CRASH_LOADED]);
        device.write(0, &[byte[0] & PANICKED]);
        assert_eq!(
            *seen.lock().unwrap(),
            [GuestRequest::CrashLoaded, GuestRequest::Panicked]
        );
    }
}
