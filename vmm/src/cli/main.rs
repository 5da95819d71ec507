//! The `fanlight` program.

#[cfg(test)]
mod book;
mod command;
mod complete;
mod completion_scripts;
mod ctl;
#[cfg(test)]
mod docs_tests;
mod doctor;
mod help;
mod log;
mod man;
mod option_page;
mod option_schema;
mod option_table;
mod options;
mod text;
mod usage_error;
mod vfio_bind;

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    time::Instant,
};

use crate::vfio_bind::VfioBindError;
use fanlight::{
    control::queue::ControlQueue,
    control::requests::SetLog,
    control::run_loop,
    control::serve::{self, with_api_defaults},
    host::files,
    host::signals::Signals,
    host::terminal,
    renderer, viewer,
    vm::ending::Ending,
    vm::error::RunError,
    vm::fault::Classify,
    vm::resources::Resources,
};
use fanlight_api::{server::Server, socket::Descriptors};
use fanlight_devices::error_line;
use tracing_subscriber::filter::{LevelFilter, Targets};

use options::{ApiOptions, Command, RunOptions, ServeOptions, VfioCommand};

fn main() -> ExitCode {
    let started = Instant::now();
    match completion_scripts::answer() {
        Ok(false) => {}
        Ok(true) => return ExitCode::SUCCESS,
        Err(_) => return ExitCode::FAILURE,
    }
    let options = match command::parse(std::env::args_os()) {
        Ok(options) => options,
        Err(error) => return usage_error::report(&error, &arguments()).into(),
    };
    let ending = match options.command {
        Command::Run(options) => run(*options, started),
        Command::Doctor { device, json } => doctor(device.as_deref(), json),
        Command::Vfio(command) => vfio(&command),
        Command::Serve(options) => serve(options),
        Command::Ctl(options) => return ctl::run(&options),
        Command::View(options) => {
            let _ = log::start(&options.log.level);
            match viewer::run(&options.socket, options.gpu, options.output) {
                Ok(()) => Ending::PowerOff,
                Err(error) => failed(&error),
            }
        }
        Command::Help { topic } => match help::on(&topic) {
            Ok(text) => printed(&text),
            Err(error) => {
                eprintln!("fanlight: {error}");
                Ending::BadInput
            }
        },
        Command::Completions { shell } => match completion_scripts::script(shell) {
            Ok(script) => printed(&script),
            Err(error) => failed(&error),
        },
        Command::Man { directory } => match man::write(&directory) {
            Ok(paths) => {
                let lines = paths.iter().map(|path| format!("{}\n", path.display()));
                printed(&lines.collect::<String>())
            }
            Err(error) => failed(&error),
        },
        Command::Renderer => {
            let _ = log::start(&Targets::new().with_default(LevelFilter::WARN));
            renderer::process::run();
            Ending::PowerOff
        }
        Command::TerminalGuard => match terminal::guard() {
            Ok(()) => Ending::PowerOff,
            Err(_) => Ending::Failed,
        },
    };
    ending.into()
}

/// The program's arguments as text, without its name.
fn arguments() -> Vec<String> {
    let arguments = std::env::args_os().skip(1);
    arguments
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect()
}

/// Prints text. A reader that closed the pipe wants no more.
fn printed(text: &str) -> Ending {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => failed(&error),
        _ => Ending::PowerOff,
    }
}

fn bad_input(error: &dyn std::error::Error) -> Ending {
    eprintln!("fanlight: {}", error_line(error));
    Ending::BadInput
}

fn failed(error: &dyn std::error::Error) -> Ending {
    eprintln!("fanlight: {}", error_line(error));
    Ending::Failed
}

/// Prints an error of a machine, with the option that it is about. Options are named like the configuration's fields.
fn print_about(field: Option<&str>, error: &dyn std::error::Error) {
    let option = field.map_or_else(String::new, |field| {
        format!("--{}: ", field.replace('_', "-"))
    });
    eprintln!("fanlight: {option}{}", error_line(error));
}

fn run(mut options: RunOptions, started: Instant) -> Ending {
    files::allow_all();
    let set_log = log::start(&options.log.level);
    let socket = options.api_socket.take();
    let settings = socket.map(|path| (path, options.api.clone()));
    let config = match options.into_config() {
        Ok(config) if settings.is_some() => with_api_defaults(config),
        Ok(config) => config,
        Err(error) => return bad_input(&error),
    };
    let resources = match Resources::open(config, &Descriptors::Inherited) {
        Ok(resources) => resources,
        Err(error) => {
            print_about(error.field(), &error);
            return Ending::BadInput;
        }
    };
    with_queue(set_log, settings, |signals, queue| {
        queue.created(&resources);
        run_loop::run(resources, signals, queue, started)
    })
}

fn serve(options: ServeOptions) -> Ending {
    files::allow_all();
    let set_log = log::start(&options.log.level);
    let settings = (options.api_socket, options.api);
    with_queue(set_log, Some(settings), serve::serve)
}

/// Runs `life` with signals caught and, if there are settings for it, the API served.
fn with_queue(
    set_log: SetLog,
    settings: Option<(PathBuf, ApiOptions)>,
    life: impl FnOnce(&Signals, &mut ControlQueue) -> Result<Ending, RunError>,
) -> Ending {
    let host = |action| move |source| RunError::Host { action, source };
    let signals = match Signals::catch().map_err(host("catch signals")) {
        Ok(signals) => signals,
        Err(error) => return failed(&error),
    };
    let (mut queue, handler) =
        match ControlQueue::new(set_log).map_err(host("make an event descriptor")) {
            Ok(queue) => queue,
            Err(error) => return failed(&error),
        };
    let server = settings
        .map(|(path, api)| Server::start(&api.settings(path), queue.events.clone(), handler))
        .transpose();
    let server = match server {
        Ok(server) => server,
        Err(error) => return bad_input(&error),
    };
    let result = life(&signals, &mut queue);
    // Dropping these answers waiting clients and sends the answers.
    drop(queue);
    drop(server);
    match result {
        Ok(ending) => ending,
        // The machine is dropped, so the terminal is restored.
        Err(error) => {
            print_about(error.field(), &error);
            if error.fault().is_bad_input() {
                Ending::BadInput
            } else {
                Ending::Failed
            }
        }
    }
}

fn doctor(device: Option<&str>, json: bool) -> Ending {
    let device = match device.map(vfio_bind::find).transpose() {
        Ok(device) => device,
        Err(error) => {
            eprintln!("fanlight: {}", error_line(&error));
            return Ending::BadInput;
        }
    };
    let report = doctor::report(device.as_ref());
    if json {
        println!("{:#}", serde_json::json!(report));
    } else {
        print!("{}", report.to_text());
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
            return match vfio_bind::list() {
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
            vfio_bind::find(device).and_then(|function| vfio_bind::bind(&function, *vfs))
        }
        VfioCommand::Unbind { device } => {
            vfio_bind::find(device).and_then(|function| vfio_bind::unbind(&function))
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
                VfioBindError::Host { .. } => Ending::Failed,
                _ => Ending::BadInput,
            }
        }
    }
}
