//! How long a guest continues after a panic of its kernel.
//!
//! Linux notifies pvpanic before it flushes its consoles (`kernel/panic.c`: the notifiers run before
//! `console_flush_on_panic`). A machine that ended at the notification would lose the reason on the console.

use std::time::{Duration, Instant};

/// The guest has finished once its vCPUs have not exited for this long.
const QUIET: Duration = Duration::from_millis(300);
/// The machine ends after this at the latest.
const LONGEST: Duration = Duration::from_secs(5);

/// The time between a panic and the end.
#[derive(Debug)]
pub struct PanicGrace {
    /// Exits of the vCPUs at the last check that found more of them.
    exits: u64,
    /// The time of that check.
    last_exit: Instant,
    until: Instant,
}

impl PanicGrace {
    /// The panic was at `now`, after `exits` exits of the vCPUs.
    pub fn begin(now: Instant, exits: u64) -> Self {
        Self {
            exits,
            last_exit: now,
            until: now + LONGEST,
        }
    }

    /// When to call [`Self::is_over`] next.
    pub fn check_at(&self) -> Instant {
        (self.last_exit + QUIET).min(self.until)
    }

    /// Whether the guest has finished at `now`, after `exits` exits of the vCPUs.
    pub fn is_over(&mut self, now: Instant, exits: u64) -> bool {
        if now >= self.until {
            return true;
        }
        if exits != self.exits {
            self.exits = exits;
            self.last_exit = now;
        }
        now >= self.last_exit + QUIET
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_ends_it() {
        let start = Instant::now();
        let mut grace = PanicGrace::begin(start, 10);
        assert!(!grace.is_over(start + QUIET / 2, 10));
        assert!(!grace.is_over(start + QUIET, 11));
        assert_eq!(grace.check_at(), start + QUIET * 2);
        assert!(!grace.is_over(start + QUIET * 3 / 2, 11));
        assert!(grace.is_over(start + QUIET * 2, 11));
    }

    #[test]
    fn a_guest_that_goes_on_and_on_is_ended() {
        let start = Instant::now();
        let mut grace = PanicGrace::begin(start, 0);
        let mut now = start;
        let mut exits = 0;
        while !grace.is_over(now, exits) {
            now = grace.check_at();
            exits += 1;
            assert!(now <= start + LONGEST);
        }
        assert_eq!(now, start + LONGEST);
    }
}
