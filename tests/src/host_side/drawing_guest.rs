//! The host's end of the program that draws in a guest (`guest-agent draw`).

use std::{thread, time::Duration};

use crate::{Result, host_side::guest::Guest};

/// A guest that runs [`guest_draw`](crate::guest_side::guest_draw), as seen from the host.
pub struct DrawingGuest {
    /// The guest.
    pub guest: Guest,
    asked: u32,
}

impl DrawingGuest {
    /// Takes a guest that has reported that it shows a picture.
    pub fn new(guest: Guest) -> Self {
        Self { guest, asked: 0 }
    }

    /// Sends the program a line. Returns the numbers in its answer.
    pub fn ask(&mut self, line: &str) -> Result<Vec<f64>> {
        self.asked += 1;
        self.guest.send(&format!("{line}\n"))?;
        let mark = format!("agent: did {}: ", self.asked);
        self.guest.wait_for(&mark)?;
        loop {
            let said = self.guest.transcript();
            let answer = said.lines().find_map(|line| line.strip_prefix(&mark));
            // The line may be incomplete.
            if let Some(answer) = answer.and_then(|answer| answer.strip_suffix('.')) {
                let words = answer.split(|c: char| !c.is_ascii_digit());
                return Ok(words.filter_map(|word| word.parse().ok()).collect());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}
