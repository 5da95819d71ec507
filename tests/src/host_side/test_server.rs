//! L1's end of a nested host in which tests run in turn.
//!
//! It reads test names from its standard input, L1's serial line, and runs each test in its own process.

use std::{
    io::{self, BufRead, Write},
    process::{Command, ExitCode},
};

use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

use super::test_process;
use crate::{Context, Result};

/// Printed when the first name can come.
pub const READY: &str = "fanlight-tests: ready";
/// The start of the line that ends a test's output; the test's exit status follows.
pub const STATUS: &str = "fanlight-tests: status ";

/// Runs tests as their names arrive, until the input ends. `command` makes the command for one test.
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
            // The output of the test may have ended within a line.
            println!("\n{STATUS}{status}");
            io::stdout().flush().context("cannot report a status")?;
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

/// Switches the echo of the serial line off.
fn quiet() -> Result<()> {
    let stdin = io::stdin();
    let Ok(mut modes) = tcgetattr(&stdin) else {
        return Ok(());
    };
    modes.local_modes &= !LocalModes::ECHO;
    tcsetattr(&stdin, OptionalActions::Now, &modes).context("cannot set the serial line up")
}
