//! How long a guest whose kernel has panicked goes on.
//!
//! Linux tells pvpanic before it has flushed its consoles (`kernel/panic.c`: the notifiers run before
//! `console_flush_on_panic`), so a machine that ended there would take the reason with it.

use std::time::{Duration, Instant};

/// A guest that asked the machine for nothing for so long has said what it had to say.
const QUIET: Duration = Duration::from_millis(300);
/// It ends after this at the latest.
const LONGEST: Duration = Duration::from_secs(5);

/// The time between a panic and the end.
#[derive(Debug)]
pub struct LastWords {
    /// Exits of the vCPUs when they were last seen to change, and when that was.
    exits: u64,
    heard: Instant,
    until: Instant,
}

impl LastWords {
    /// The panic is at `now`, after `exits` exits of the vCPUs.
    pub fn begin(now: Instant, exits: u64) -> Self {
        Self {
            exits,
            heard: now,
            until: now + LONGEST,
        }
    }

    /// When to ask [`Self::are_over`] again.
    pub fn look_at(&self) -> Instant {
        (self.heard + QUIET).min(self.until)
    }

    /// Whether the guest has nothing more to say at `now`, after `exits` exits of the vCPUs.
    pub fn are_over(&mut self, now: Instant, exits: u64) -> bool {
        if now >= self.until {
            return true;
        }
        if exits != self.exits {
            self.exits = exits;
            self.heard = now;
        }
        now >= self.heard + QUIET
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_ends_it() {
        let start = Instant::now();
        let mut words = LastWords::begin(start, 10);
        assert!(!words.are_over(start + QUIET / 2, 10));
        assert!(!words.are_over(start + QUIET, 11));
        assert_eq!(words.look_at(), start + QUIET * 2);
        assert!(!words.are_over(start + QUIET * 3 / 2, 11));
        assert!(words.are_over(start + QUIET * 2, 11));
    }

    #[test]
    fn a_guest_that_goes_on_and_on_is_ended() {
        let start = Instant::now();
        let mut words = LastWords::begin(start, 0);
        let mut now = start;
        let mut exits = 0;
        while !words.are_over(now, exits) {
            now = words.look_at();
            exits += 1;
            assert!(now <= start + LONGEST);
        }
        assert_eq!(now, start + LONGEST);
    }
}
