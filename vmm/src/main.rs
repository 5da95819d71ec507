//! The `fanlight` program.

mod options;

use std::{process::ExitCode, time::Instant};

use clap::Parser;
use fanlight::{
    doctor::Report,
    host_devices::{self, HostDeviceError},
    lifecycle,
    resources::Resources,
    status::Ending,
    terminal,
};
use fanlight_devices::error_line;
use options::{Command, Options, RunOptions, VfioCommand};

fn main() -> ExitCode {
    let started = Instant::now();
    let ending = match Options::parse().command {
        Command::Run(options) => run(*options, started),
        Command::Doctor { device, json } => doctor(device.as_deref(), json),
        Command::Vfio(command) => vfio(&command),
        Command::TerminalGuard => match terminal::guard() {
            Ok(()) => Ending::PowerOff,
            Err(_) => Ending::Failed,
        },
    };
    ending.into()
}

fn run(options: RunOptions, started: Instant) -> Ending {
    options::start_log(&options.log);
    let bad_input = |error: &dyn std::error::Error| {
        eprintln!("fanlight: {}", error_line(error));
        Ending::BadInput
    };
    let config = match options.into_config() {
        Ok(config) => config,
        Err(error) => return bad_input(&error),
    };
    let resources = match Resources::open(config) {
        Ok(resources) => resources,
        Err(error) => return bad_input(&error),
    };
    match lifecycle::run(resources, started) {
        Ok(ending) => ending,
        // By now the terminal is itself again: the machine and its consoles are gone.
        Err(error) if error.is_bad_input() => bad_input(&error),
        Err(error) => {
            eprintln!("fanlight: {}", error_line(&error));
            Ending::Failed
        }
    }
}

fn doctor(device: Option<&str>, json: bool) -> Ending {
    let device = match device.map(host_devices::find).transpose() {
        Ok(device) => device,
        Err(error) => {
            eprintln!("fanlight: {}", error_line(&error));
            return Ending::BadInput;
        }
    };
    let report = Report::of(device.as_ref());
    if json {
        println!("{:#}", serde_json::json!(report));
    } else {
        print!("{}", report.for_people());
    }
    if report.ready {
        Ending::PowerOff
    } else {
        Ending::Failed
    }
}

fn vfio(command: &VfioCommand) -> Ending {
    let result = match command {
        VfioCommand::List => {
            return match host_devices::list() {
                Ok(table) => {
                    print!("{table}");
                    Ending::PowerOff
                }
                Err(error) => {
                    eprintln!("fanlight: cannot list PCI devices: {error}");
                    Ending::Failed
                }
            };
        }
        VfioCommand::Bind { device, vfs } => {
            host_devices::find(device).and_then(|function| host_devices::bind(&function, *vfs))
        }
        VfioCommand::Unbind { device } => {
            host_devices::find(device).and_then(|function| host_devices::unbind(&function))
        }
    };
    match result {
        Ok(changed) => {
            for address in changed {
                println!("{address}");
            }
            Ending::PowerOff
        }
        Err(error) => {
            eprintln!("fanlight: {}", error_line(&error));
            match error {
                HostDeviceError::Host { .. } => Ending::Failed,
                _ => Ending::BadInput,
            }
        }
    }
}
