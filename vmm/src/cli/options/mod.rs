//! The command line as types. `fanlight run` has a file of its own.

mod run;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::ArgValueCompleter;
use fanlight_api::server::Settings;
use tracing_subscriber::filter::Targets;

use crate::complete;
pub use run::RunOptions;

/// A small KVM virtual machine monitor.
#[derive(Debug, Parser)]
#[command(
    version,
    about,
    max_term_width = crate::text::MAX_WIDTH,
    disable_help_subcommand = true,
    after_help = "'fanlight help COMMAND' describes a command, 'fanlight help OPTION' an option of run."
)]
pub struct Options {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a virtual machine until it ends
    #[command(
        disable_help_flag = true,
        after_help = RUN_MORE,
        after_long_help = RUN_AFTER
    )]
    Run(Box<RunOptions>),
    /// Serve the control API; a client creates and boots the machine
    Serve(ServeOptions),
    /// Call a method of the control API
    #[command(disable_help_flag = true, after_help = CTL_AFTER)]
    Ctl(CtlOptions),
    /// Show an output of a machine in a Wayland window
    ///
    /// Ctrl-Alt-G releases the keyboard.
    View(ViewOptions),
    /// Check whether this host can serve a guest with a GPU
    ///
    /// A failed check says how to fix it. The exit status is 1 if a check failed, else 0.
    Doctor {
        /// Check this PCI device too, such as 0000:03:00.1
        #[arg(value_name = "ADDRESS", add = ArgValueCompleter::new(complete::pci_addresses))]
        device: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List PCI devices of the host, bind them to vfio-pci and unbind them
    #[command(subcommand, disable_help_subcommand = true)]
    Vfio(VfioCommand),
    /// Describe a command, or an option of run
    Help {
        /// A command such as 'ctl' or 'vfio bind', or an option such as 'disk' or '--vfio'
        #[arg(value_name = "COMMAND|OPTION", allow_hyphen_values = true)]
        topic: Vec<String>,
    },
    /// Print a completion script for a shell
    #[command(after_help = COMPLETIONS_AFTER)]
    Completions {
        /// The shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a directory
    Man {
        /// An existing directory
        #[arg(value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
        directory: PathBuf,
    },
    /// Restore the terminal when the process on standard input ends
    #[command(name = fanlight::host::terminal::GUARD_COMMAND, hide = true)]
    TerminalGuard,
    /// Draw for the guest of the process on standard input
    #[command(name = fanlight::renderer::COMMAND, hide = true)]
    Renderer,
}

const RUN_MORE: &str = "\
'fanlight run --help' has more; 'fanlight help OPTION' describes an option, such as 'fanlight help disk'.";

/// Examples, exit statuses and signals of `fanlight run`.
pub const RUN_AFTER: &str = "\
Examples:
  fanlight run --kernel vmlinuz --initrd initrd.img --cpus 2 --memory 1G
  fanlight run --config machine.json --disk disk.qcow2,format=qcow2
  fanlight run --kernel vmlinuz --disk disk.img --net tap0 \\
      --cmdline \"root=/dev/vda1 console=ttyS0 panic=-1\"
  fanlight run --kernel vmlinuz --disk disk.img --gpu 1920x1080 \\
      --vfio 0000:03:00.1 --api-socket vm.sock

Exit status:
  0   the guest powered off
  1   Fanlight failed
  2   bad input; nothing was started
  32  the guest requested a reset, with --on-reset exit
  33  the guest kernel panicked, with --on-panic exit
  34  stopped from outside: Ctrl-A x, vm.stop, a second signal, or no
      shutdown within 30 s after a signal

Signals:
  SIGTERM, SIGINT and SIGHUP press the power button of the guest. A second
  signal stops the machine at once.

'fanlight help OPTION' describes an option, such as 'fanlight help disk'.";

const CTL_AFTER: &str = "\
'fanlight ctl SOCKET --help' lists the methods of the server.

Parameters are one JSON object, or key=value pairs. A value that is not JSON is
text. In a.b=value, b is a field of the field a. In place of a path or a tap,
fd:N is an open descriptor, which is sent along; in JSON it is {\"fd\": N}.

The result is JSON, or a table if standard output is a terminal. console.attach
connects the console to standard input and output; on a terminal Ctrl-A x leaves
it. events.subscribe prints events until the server ends.

Examples:
  fanlight ctl vm.sock vm.info
  fanlight ctl vm.sock device.add disk.path=data.img
  fanlight ctl vm.sock device.add disk.path=fd:3 3<>data.img

Exit status:
  0  the method succeeded
  1  the method failed
  2  the command line is wrong";

const COMPLETIONS_AFTER: &str = "\
Examples:
  source <(fanlight completions bash)
  fanlight completions zsh > ~/.zfunc/_fanlight
  fanlight completions fish > ~/.config/fish/completions/fanlight.fish";

/// The commands on PCI devices of the host.
#[derive(Debug, Subcommand)]
pub enum VfioCommand {
    /// List the PCI devices that can be passed through
    List,
    /// Bind a device to vfio-pci, or create virtual functions of it and bind those
    Bind {
        /// PCI address, such as 0000:03:00.0
        #[arg(value_name = "ADDRESS", add = ArgValueCompleter::new(complete::pci_addresses))]
        device: String,
        /// Create N virtual functions and bind them instead of the device
        #[arg(long, value_name = "N")]
        vfs: Option<u32>,
    },
    /// Return a device to its host driver, or remove its virtual functions
    Unbind {
        /// PCI address, such as 0000:03:00.0
        #[arg(value_name = "ADDRESS", add = ArgValueCompleter::new(complete::pci_addresses))]
        device: String,
    },
}

/// Options of `fanlight view`.
#[derive(Args, Debug)]
pub struct ViewOptions {
    /// Socket of the control API
    #[arg(value_name = "SOCKET", value_hint = clap::ValueHint::FilePath)]
    pub socket: PathBuf,
    /// Number of the GPU
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub gpu: u32,
    /// Number of the output
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub output: u32,
    #[command(flatten)]
    pub log: LogOptions,
}

/// Options of `fanlight ctl`.
#[derive(Args, Debug)]
pub struct CtlOptions {
    /// Socket of the control API
    #[arg(value_name = "SOCKET", value_hint = clap::ValueHint::FilePath)]
    pub socket: Option<PathBuf>,
    /// Method, such as vm.info
    #[arg(value_name = "METHOD", add = ArgValueCompleter::new(complete::methods))]
    pub method: Option<String>,
    /// Parameters of the method
    #[arg(value_name = "JSON|KEY=VALUE", allow_hyphen_values = true)]
    pub params: Vec<String>,
    /// Print JSON on a terminal too
    #[arg(long)]
    pub json: bool,
    /// List the methods of the server, or describe METHOD
    #[arg(short, long)]
    pub help: bool,
}

/// Access to the control API.
#[derive(Args, Clone, Debug)]
pub struct ApiOptions {
    /// Let this user connect too; may be repeated
    ///
    /// The user that runs Fanlight and root always may.
    #[arg(long, value_name = "UID", help_heading = run::CONTROL)]
    api_allow_uid: Vec<u32>,
}

impl ApiOptions {
    /// Settings of a server on the socket `path`.
    pub fn settings(&self, path: PathBuf) -> Settings {
        Settings {
            path,
            allow_uids: self.api_allow_uid.clone(),
        }
    }
}

/// Options of `fanlight serve`.
#[derive(Args, Debug)]
pub struct ServeOptions {
    /// Serve the control API on this UNIX socket
    #[arg(
        long,
        value_name = "SOCKET",
        value_hint = clap::ValueHint::FilePath,
        help_heading = run::CONTROL
    )]
    pub api_socket: PathBuf,
    #[command(flatten)]
    pub api: ApiOptions,
    #[command(flatten)]
    pub log: LogOptions,
}

/// Logging.
#[derive(Args, Debug)]
pub struct LogOptions {
    /// Log level: error, warn, info, debug [default: warn]
    ///
    /// Messages go to standard error. The value is off, error, warn, info, debug or trace, or a list of
    /// module=level pairs such as warn,fanlight_devices::virtio=debug. The environment variable FANLIGHT_LOG
    /// sets the default.
    #[arg(
        long = "log",
        value_name = "LEVEL",
        env = "FANLIGHT_LOG",
        hide_env = true,
        default_value = "warn",
        hide_default_value = true,
        value_parser = crate::log::filter,
        add = ArgValueCompleter::new(complete::log_levels),
        help_heading = run::CONTROL
    )]
    pub level: Targets,
}
