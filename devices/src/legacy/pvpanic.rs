//! pvpanic: the kernel of the guest reports that it panicked (QEMU `docs/specs/pvpanic`).

use std::sync::atomic::{AtomicU8, Ordering};

use super::guest_request::{GuestRequest, RequestSink};
use crate::memory::IoHandler;

/// The guest panicked and stops.
const PANICKED: u8 = 1 << 0;
/// The guest panicked and goes on in its crash kernel.
const CRASH_LOADED: u8 = 1 << 1;

/// The event register: a read returns the supported events, a write reports one.
///
/// Each is passed on once, so that a guest that writes for ever causes no work.
pub struct PvPanic {
    requests: RequestSink,
    reported: AtomicU8,
}

impl PvPanic {
    /// A device that reports to `requests`.
    pub fn new(requests: RequestSink) -> Self {
        Self {
            requests,
            reported: AtomicU8::new(0),
        }
    }
}

impl IoHandler for PvPanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        if let Some(byte) = data.first_mut() {
            *byte = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let (event, request) = match data.first() {
            Some(byte) if byte & PANICKED != 0 => (PANICKED, GuestRequest::Panicked),
            Some(byte) if byte & CRASH_LOADED != 0 => (CRASH_LOADED, GuestRequest::CrashLoaded),
            _ => return,
        };
        if self.reported.fetch_or(event, Ordering::Relaxed) & event == 0 {
            (self.requests)(request);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::test_util::requests;

    #[test]
    fn reports_what_it_says_it_supports_once() {
        let (sink, seen) = requests();
        let device = PvPanic::new(sink);
        let mut byte = [0];
        device.read(0, &mut byte);
        device.write(0, &[4]);
        for _ in 0..3 {
            device.write(0, &[byte[0] & CRASH_LOADED]);
        }
        for _ in 0..3 {
            device.write(0, &[byte[0] & PANICKED]);
        }
        assert_eq!(
            *seen.lock(),
            [GuestRequest::CrashLoaded, GuestRequest::Panicked]
        );
    }
}
