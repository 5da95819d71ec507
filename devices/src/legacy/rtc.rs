//! MC146818 real-time clock: the time of day in UTC, without alarms and interrupts.
//!
//! Time registers follow the clock of the host plus the offset that the guest has set. The other bytes are plain
//! memory.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::{memory::IoHandler, sync::Mutex};

/// How many ports the device answers.
pub const PORTS: u64 = 2;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const DAY_OF_WEEK: u8 = 0x06;
const DAY_OF_MONTH: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
/// Where ACPI's FADT says the century is.
const CENTURY: u8 = 0x32;

/// Register A: 32.768 kHz time base, no rate, no update in progress.
const A_TIME_BASE: u8 = 0x20;
/// Register B: 24-hour mode, binary-coded decimal.
const B_24_HOURS: u8 = 1 << 1;
/// Register B: updates stopped while the time is set.
const B_SET: u8 = 1 << 7;
/// Register D: RAM and time are valid.
const D_VALID: u8 = 1 << 7;

/// The index port also carries the NMI mask in bit 7.
const INDEX_MASK: u8 = 0x7f;
const SECONDS_A_DAY: i64 = 86_400;

/// The clock.
#[derive(Debug, Default)]
pub struct Rtc(Mutex<State>);

#[derive(Debug)]
struct State {
    index: u8,
    /// How far the time of the guest is ahead of the host, in seconds.
    ahead: i64,
    /// Time registers as the guest is setting them, while register B's SET is on.
    setting: Option<DateTime>,
    ram: [u8; 128],
}

impl Default for State {
    fn default() -> Self {
        Self {
            index: 0,
            ahead: 0,
            setting: None,
            ram: [0; 128],
        }
    }
}

impl State {
    fn now(&self) -> DateTime {
        if let Some(setting) = self.setting {
            return setting;
        }
        let host = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs());
        DateTime::from_unix(i64::try_from(host).unwrap_or(0).saturating_add(self.ahead))
    }

    fn read(&self) -> u8 {
        let now = self.now();
        match self.index {
            SECONDS => bcd(now.second),
            MINUTES => bcd(now.minute),
            HOURS => bcd(now.hour),
            DAY_OF_WEEK => now.day_of_week(),
            DAY_OF_MONTH => bcd(now.day),
            MONTH => bcd(now.month),
            YEAR => bcd((now.year % 100) as u8),
            CENTURY => bcd((now.year / 100 % 100) as u8),
            REGISTER_A => A_TIME_BASE,
            REGISTER_B => B_24_HOURS | if self.setting.is_some() { B_SET } else { 0 },
            REGISTER_C => 0,
            REGISTER_D => D_VALID,
            index => self.ram[usize::from(index & INDEX_MASK)],
        }
    }

    fn write(&mut self, value: u8) {
        if self.index == REGISTER_B {
            match (value & B_SET != 0, self.setting) {
                (true, None) => self.setting = Some(self.now()),
                (false, Some(set)) => {
                    self.setting = None;
                    self.ahead += set.unix() - self.now().unix();
                }
                _ => {}
            }
            return;
        }
        let was_set = self.setting.is_some();
        let mut time = self.now();
        let field = from_bcd(value);
        match self.index {
            SECONDS => time.second = field.min(59),
            MINUTES => time.minute = field.min(59),
            HOURS => time.hour = field.min(23),
            DAY_OF_MONTH => time.day = field.clamp(1, 31),
            MONTH => time.month = field.clamp(1, 12),
            YEAR => time.year = time.year / 100 * 100 + i64::from(field.min(99)),
            CENTURY => time.year = i64::from(field.min(99)) * 100 + time.year % 100,
            DAY_OF_WEEK | REGISTER_A | REGISTER_C | REGISTER_D => return,
            index => {
                self.ram[usize::from(index & INDEX_MASK)] = value;
                return;
            }
        }
        if was_set {
            self.setting = Some(time);
        } else {
            self.ahead += time.unix() - self.now().unix();
        }
    }
}

impl IoHandler for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let ([byte], 1) = (data, offset) {
            *byte = self.0.lock().read();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[byte] = data else { return };
        let mut state = self.0.lock();
        match offset {
            0 => state.index = byte & INDEX_MASK,
            1 => state.write(byte),
            _ => {}
        }
    }
}

fn bcd(value: u8) -> u8 {
    ((value / 10) << 4) | (value % 10)
}

fn from_bcd(value: u8) -> u8 {
    (value >> 4).saturating_mul(10).saturating_add(value & 0xf)
}

/// A time of day in the Gregorian calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DateTime {
    year: i64,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl DateTime {
    /// Days are counted from 0000-03-01, so that the leap day ends a year of the calculation.
    fn from_unix(seconds: i64) -> Self {
        let (days, of_day) = (
            seconds.div_euclid(SECONDS_A_DAY) + 719_468,
            seconds.rem_euclid(SECONDS_A_DAY),
        );
        let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let month = if shifted_month < 10 {
            shifted_month + 3
        } else {
            shifted_month - 9
        };
        Self {
            year: era * 400 + year_of_era + i64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * shifted_month + 2) / 5 + 1) as u8,
            hour: (of_day / 3_600) as u8,
            minute: (of_day / 60 % 60) as u8,
            second: (of_day % 60) as u8,
        }
    }

    fn unix(&self) -> i64 {
        let month = i64::from(self.month);
        let year = self.year - i64::from(month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let shifted_month = if month > 2 { month - 3 } else { month + 9 };
        let day_of_year = (153 * shifted_month + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        (era * 146_097 + day_of_era - 719_468) * SECONDS_A_DAY
            + i64::from(self.hour) * 3_600
            + i64::from(self.minute) * 60
            + i64::from(self.second)
    }

    /// 1 is Sunday.
    fn day_of_week(&self) -> u8 {
        ((self.unix().div_euclid(SECONDS_A_DAY) + 4).rem_euclid(7) + 1) as u8
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn get(rtc: &Rtc, index: u8) -> u8 {
        rtc.write(0, &[index]);
        let mut byte = [0];
        rtc.read(1, &mut byte);
        byte[0]
    }

    fn set(rtc: &Rtc, index: u8, value: u8) {
        rtc.write(0, &[index]);
        rtc.write(1, &[value]);
    }

    #[test]
    fn known_dates() {
        let leap = DateTime::from_unix(951_782_400);
        assert_eq!((leap.year, leap.month, leap.day), (2000, 2, 29));
        assert_eq!(leap.day_of_week(), 3);
        let epoch = DateTime::from_unix(0);
        assert_eq!((epoch.year, epoch.month, epoch.day), (1970, 1, 1));
        assert_eq!(epoch.day_of_week(), 5);
    }

    #[test]
    fn a_time_that_was_set_stays_set() {
        let rtc = Rtc::default();
        set(&rtc, REGISTER_B, B_SET | B_24_HOURS);
        for (index, value) in [
            (CENTURY, 0x20),
            (YEAR, 0x31),
            (MONTH, 0x12),
            (DAY_OF_MONTH, 0x25),
            (HOURS, 0x10),
            (MINUTES, 0x30),
            (SECONDS, 0x00),
        ] {
            set(&rtc, index, value);
        }
        set(&rtc, REGISTER_B, B_24_HOURS);
        assert_eq!(get(&rtc, CENTURY), 0x20);
        assert_eq!(get(&rtc, YEAR), 0x31);
        assert_eq!(get(&rtc, DAY_OF_MONTH), 0x25);
        assert_eq!(get(&rtc, MINUTES), 0x30);
    }

    proptest! {
        #[test]
        fn dates_round_trip(seconds in -60_000_000_000i64..250_000_000_000) {
            prop_assert_eq!(DateTime::from_unix(seconds).unix(), seconds);
        }

        #[test]
        fn any_writes_are_survived(ops in prop::collection::vec((any::<u8>(), any::<u8>()), 0..200)) {
            let rtc = Rtc::default();
            for (index, value) in ops {
                set(&rtc, index, value);
                get(&rtc, index);
            }
        }
    }
}
