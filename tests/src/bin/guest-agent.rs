//! Runs in guests: the other end of conversations over TCP and vsock.

use std::process::ExitCode;

use fanlight_tests::{Failure, Result, echo};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match act(&arguments) {
        Ok(line) => {
            println!("agent: {line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("agent failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn act(arguments: &[String]) -> Result<String> {
    match arguments {
        [verb, address] if verb == "serve" => {
            let bytes = echo::serve(&address.parse()?)?;
            Ok(format!("served {bytes} bytes"))
        }
        [verb, address, bytes] if verb == "call" => {
            let bytes = bytes
                .parse()
                .map_err(|_| Failure(format!("{bytes:?} is not a number")))?;
            echo::call(&address.parse()?, bytes)?;
            Ok(format!("called with {bytes} bytes"))
        }
        _ => Err(Failure(
            "usage: guest-agent serve ADDRESS | call ADDRESS BYTES".into(),
        )),
    }
}
