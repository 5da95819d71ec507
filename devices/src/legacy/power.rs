//! Registers of hardware-reduced ACPI: the generic event device with the power button, sleep
//! control and status (ACPI 6.5, 4.8.3.7), and the reset register (4.8.3.6).

use std::sync::atomic::{AtomicU8, Ordering};

use fanlight_arch::layout::{
    GED_PORT, GED_POWER_BUTTON, RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
    SLEEP_TYPE_S5,
};
use vmm_sys_util::eventfd::EventFd;

use super::guest_request::{GuestRequest, RequestSink};
use crate::memory::IoHandler;

/// How many ports the device answers, from [`GED_PORT`] on.
pub const PORTS: u64 = (RESET_PORT - GED_PORT) as u64 + 1;

/// SLP_EN of the sleep control register.
const SLP_EN: u8 = 1 << 5;
/// Position of SLP_TYP in the sleep control register.
const SLP_TYP_SHIFT: u8 = 2;
/// SLP_TYP once it is shifted down.
const SLP_TYP_MASK: u8 = 0b111;
/// WAK_STS of the sleep status register: reads as set after a wake-up. This machine never sleeps.
const SLEEP_STATUS: u8 = 0;

const SLEEP_CONTROL: u64 = (SLEEP_CONTROL_PORT - GED_PORT) as u64;
const SLEEP_STATUS_OFFSET: u64 = (SLEEP_STATUS_PORT - GED_PORT) as u64;
const RESET: u64 = (RESET_PORT - GED_PORT) as u64;

/// Power button, soft off and reset.
pub struct PowerDevice {
    /// Events that the guest has not read yet.
    pending: AtomicU8,
    interrupt: EventFd,
    requests: RequestSink,
}

impl PowerDevice {
    /// `interrupt` is the line of the generic event device.
    pub fn new(interrupt: EventFd, requests: RequestSink) -> Self {
        Self {
            pending: AtomicU8::new(0),
            interrupt,
            requests,
        }
    }

    /// Presses the power button.
    pub fn press_power_button(&self) -> std::io::Result<()> {
        self.pending.fetch_or(GED_POWER_BUTTON, Ordering::AcqRel);
        self.interrupt.write(1)
    }

    /// Clears unread events (machine reset).
    pub fn reset(&self) {
        self.pending.store(0, Ordering::Release);
    }
}

impl IoHandler for PowerDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let [byte] = data {
            *byte = match offset {
                0 => self.pending.swap(0, Ordering::AcqRel),
                SLEEP_STATUS_OFFSET => SLEEP_STATUS,
                _ => 0,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[byte] = data else { return };
        match offset {
            SLEEP_CONTROL
                if byte & SLP_EN != 0
                    && (byte >> SLP_TYP_SHIFT) & SLP_TYP_MASK == SLEEP_TYPE_S5 =>
            {
                (self.requests)(GuestRequest::PowerOff);
            }
            RESET if byte == RESET_VALUE => (self.requests)(GuestRequest::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::test_util::requests;

    #[test]
    fn the_button_is_pending_until_read() {
        let event = EventFd::new(0).unwrap();
        let device = PowerDevice::new(event.try_clone().unwrap(), requests().0);
        device.press_power_button().unwrap();
        assert_eq!(event.read().unwrap(), 1);
        let mut byte = [0];
        device.read(0, &mut byte);
        assert_eq!(byte, [GED_POWER_BUTTON]);
        device.read(0, &mut byte);
        assert_eq!(byte, [0]);
    }

    #[test]
    fn only_s5_and_the_reset_value_count() {
        let (sink, seen) = requests();
        let device = PowerDevice::new(EventFd::new(0).unwrap(), sink);
        device.write(SLEEP_CONTROL, &[SLP_EN | 3 << SLP_TYP_SHIFT]);
        device.write(SLEEP_CONTROL, &[SLEEP_TYPE_S5 << SLP_TYP_SHIFT]);
        device.write(RESET, &[0xff]);
        assert!(seen.lock().is_empty());
        device.write(SLEEP_CONTROL, &[SLP_EN | SLEEP_TYPE_S5 << SLP_TYP_SHIFT]);
        device.write(RESET, &[RESET_VALUE]);
        assert_eq!(*seen.lock(), [GuestRequest::PowerOff, GuestRequest::Reset]);
    }
}
