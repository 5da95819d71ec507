//! L1's end of a nested host in which tests run one after the other.
//!
//! It reads the names of tests from its standard input, L1's serial line, and runs each in a process of its own.

use std::{
    io::{self, BufRead, Write},
    process::{Command, ExitCode},
};

use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

use super::test_process;
use crate::{Context, Result};

/// Said when the first name can come.
pub const READY: &str = "fanlight-tests: ready";
/// A line that starts so ends a test's output, with the test's exit status.
pub const STATUS: &str = "fanlight-tests: status ";

/// Runs tests as their names come, until the input ends. `command` makes the command that runs one.
pub fn serve(command: impl Fn(&str) -> Result<Command>) -> ExitCode {
    let result = quiet().and_then(|()| {
        println!("{READY}");
        for name in io::stdin().lock().lines() {
            let name = name.context("cannot read the name of a test")?;
            let status = command(name.trim())
                .and_then(|command| test_process::run(command, &mut io::stdout()))
                .unwrap_or_else(|error| {
                    println!("{error}");
                    1
                });
            // The test may have ended in the middle of a line.
            println!("\n{STATUS}{status}");
            io::stdout().flush().context("cannot tell a status")?;
        }
        Ok(())
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Has the serial line not echo what comes.
fn quiet() -> Result<()> {
    let stdin = io::stdin();
    let Ok(mut modes) = tcgetattr(&stdin) else {
        return Ok(());
    };
    modes.local_modes &= !LocalModes::ECHO;
    tcsetattr(&stdin, OptionalActions::Now, &modes).context("cannot set the serial line up")
}
