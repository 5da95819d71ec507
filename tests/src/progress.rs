//! Long steps. A terminal shows a spinner with the time; elsewhere lines tell the beginning, the parts, the time that
//! has gone and the end.

use std::{
    io::IsTerminal,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a spinner turns and looks what to show.
const TICK: Duration = Duration::from_millis(200);
/// How often a line tells that a step is still under way.
const LINE: Duration = Duration::from_secs(30);

/// A step under way.
#[derive(Debug)]
pub struct Step {
    what: String,
    start: Instant,
    /// On a terminal.
    spinner: Option<ProgressBar>,
}

/// Runs `work`, and shows that it is under way and how long it took.
pub fn step<T, E>(what: &str, work: impl FnOnce(&Step) -> Result<T, E>) -> Result<T, E> {
    let step = Step::begin(what);
    let result = work(&step);
    let end = if result.is_ok() {
        "done in"
    } else {
        "failed after"
    };
    step.end(end);
    result
}

impl Step {
    /// Shows that a step begins.
    pub fn begin(what: &str) -> Self {
        let spinner = std::io::stderr().is_terminal().then(|| {
            let spinner = ProgressBar::new_spinner().with_message(what.to_owned());
            let style = ProgressStyle::with_template("fanlight: {msg} {spinner} {elapsed}");
            if let Ok(style) = style {
                spinner.set_style(style);
            }
            spinner.enable_steady_tick(TICK);
            spinner
        });
        if spinner.is_none() {
            eprintln!("fanlight: {what}");
        }
        Self {
            what: what.to_owned(),
            start: Instant::now(),
            spinner,
        }
    }

    /// Shows that it has ended: `how`, and the time.
    pub fn end(self, how: &str) {
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
        }
        let time = seconds(self.start.elapsed());
        eprintln!("fanlight: {}: {how} {time}", self.what);
    }

    /// Tells which part of the step begins.
    pub fn detail(&self, part: impl std::fmt::Display) {
        match &self.spinner {
            Some(spinner) => spinner.set_message(format!("{}: {part}", self.what)),
            None => eprintln!("fanlight: {}: {part}", self.what),
        }
    }

    /// Runs `work` and meanwhile shows what `state` says.
    pub fn watch<T>(
        &self,
        state: impl Fn() -> String + Send + Sync,
        work: impl FnOnce() -> T,
    ) -> T {
        let (ended, end) = mpsc::channel::<()>();
        thread::scope(|scope| {
            let every = if self.spinner.is_some() { TICK } else { LINE };
            scope.spawn(move || {
                while end.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                    match &self.spinner {
                        Some(_) => self.detail(state()),
                        None => {
                            self.detail(format!("{} ({})", state(), seconds(self.start.elapsed())))
                        }
                    }
                }
            });
            let result = work();
            drop(ended);
            result
        })
    }
}

fn seconds(time: Duration) -> String {
    match time.as_secs() {
        0..10 => format!("{:.1} s", time.as_secs_f64()),
        secs @ 10..60 => format!("{secs} s"),
        secs => format!("{} min {} s", secs / 60, secs % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short() {
        for (millis, text) in [(340, "0.3 s"), (59_900, "59 s"), (167_000, "2 min 47 s")] {
            assert_eq!(seconds(Duration::from_millis(millis)), text);
        }
    }
}
