//! The command line. What describes a machine is parsed into the same types that `--config` reads.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use fanlight_api::{
    CharBackend, ConsoleConfig, DiskConfig, GpuConfig, KernelUnpack, MemoryConfig, NetConfig,
    OnPanic, OnReset, PathOrFd, RngConfig, VfioConfig, VmConfig, VsockConfig, server::Settings,
};
use serde::de::DeserializeOwned;
use thiserror::Error;
use tracing_subscriber::filter::Targets;

/// A small KVM virtual machine monitor.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
pub struct Options {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the program can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs a virtual machine until it ends
    #[command(after_help = STATUSES)]
    Run(Box<RunOptions>),
    /// Says what this host lacks to give a guest a GPU, and what mends it
    Doctor {
        /// Looks at this device too, such as 0000:03:00.1
        #[arg(value_name = "ADDRESS")]
        device: Option<String>,
        /// Answers in JSON
        #[arg(long)]
        json: bool,
    },
    /// Shows PCI devices of the host, gives them to user space and takes them back
    #[command(subcommand)]
    Vfio(VfioCommand),
    /// Serves the control API; a program creates and boots the machine
    Serve(ServeOptions),
    /// Calls a method of the control API
    #[command(disable_help_flag = true, after_help = CTL_HELP)]
    Ctl(CtlOptions),
    /// Shows an output of a machine's display in a Wayland window; Ctrl-Alt-G gives the keyboard back
    View(ViewOptions),
    /// Prints shell completions
    Completions {
        /// For which shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Restores the terminal when the process on standard input ends
    #[command(name = fanlight::host::terminal::GUARD_COMMAND, hide = true)]
    TerminalGuard,
    /// Draws for the guest of the process on standard input
    #[command(name = fanlight::renderer::COMMAND, hide = true)]
    Renderer,
}

/// What can be done with devices of the host's.
#[derive(Debug, Subcommand)]
pub enum VfioCommand {
    /// Lists what could be passed through
    List,
    /// Binds a device to vfio-pci, or makes virtual functions of it and binds those
    Bind {
        /// Where the device is, such as 0000:03:00.0
        #[arg(value_name = "ADDRESS")]
        device: String,
        /// Makes this many virtual functions and binds them instead of the device
        #[arg(long, value_name = "N")]
        vfs: Option<u32>,
    },
    /// Undoes bind: gives a device back to the host's driver, or takes its virtual functions away
    Unbind {
        /// Where the device is
        #[arg(value_name = "ADDRESS")]
        device: String,
    },
}

/// Options of `fanlight view`.
#[derive(Args, Debug)]
pub struct ViewOptions {
    /// Socket of the machine's control API
    #[arg(value_name = "SOCKET")]
    pub socket: PathBuf,
    /// The GPU's number
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub gpu: u32,
    /// The output's number
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub output: u32,
    #[command(flatten)]
    pub log: LogOptions,
}

const STATUSES: &str = "\
Exit status:
  0   the guest powered itself off
  1   Fanlight failed
  2   bad input: nothing was started
  32  the guest asked for a reset, with --on-reset exit
  33  the guest's kernel panicked, with --on-panic exit
  34  stopped without the guest's consent (Ctrl-A x, a second SIGTERM, or no shutdown within 30 s)

Signals: SIGTERM, SIGINT and SIGHUP press the guest's power button; a second one stops it at once.
Lists in an option are written key=value,key=value; a comma within a value is written twice.";

const CTL_HELP: &str = "\
fanlight ctl S --help lists the methods of the server at socket S. Parameters are one JSON object, or
key=value pairs: a value that is JSON is that, else text; a.b=value is a field of a field. Where a file
or a tap is named, fd:N (in JSON also {\"fd\": N}) is descriptor N that the shell opened, which is sent along:
fanlight ctl S device.add disk.path=fd:3 3<>disk.img. The result is JSON, or a table where standard output
is a terminal. console.attach connects the console to standard input and output; on a terminal Ctrl-A x
leaves it. events.subscribe prints events until the server ends.

Exit status: 0 the method is done, 1 it is not (standard error says why), 2 the command line is wrong.";

/// Options of `fanlight ctl`.
#[derive(Args, Debug)]
pub struct CtlOptions {
    /// The server's socket
    #[arg(value_name = "S", value_hint = clap::ValueHint::FilePath)]
    pub socket: Option<PathBuf>,
    /// The method, such as vm.info
    #[arg(value_name = "METHOD")]
    pub method: Option<String>,
    /// The method's parameters
    #[arg(value_name = "JSON|key=value", allow_hyphen_values = true)]
    pub params: Vec<String>,
    /// Print JSON on a terminal too
    #[arg(long)]
    pub json: bool,
    /// List the server's methods, or describe the one that is named
    #[arg(short, long)]
    pub help: bool,
}

/// Whom the API is served to.
#[derive(Args, Clone, Debug)]
pub struct ApiOptions {
    /// User that may use the socket besides this one and root; may be given several times
    #[arg(long, value_name = "UID")]
    api_allow_uid: Vec<u32>,
}

impl ApiOptions {
    /// The server's settings.
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
    /// UNIX socket to serve the control API on
    #[arg(long, value_name = "S", value_hint = clap::ValueHint::FilePath)]
    pub api_socket: PathBuf,
    #[command(flatten)]
    pub api: ApiOptions,
    #[command(flatten)]
    pub log: LogOptions,
}

/// What is logged.
#[derive(Args, Debug)]
pub struct LogOptions {
    /// What to log to standard error: error, warn, info, debug, or module=level pairs
    #[arg(
        long = "log",
        value_name = "LEVEL",
        env = "FANLIGHT_LOG",
        default_value = "warn",
        value_parser = crate::log::filter
    )]
    pub level: Targets,
}

/// Options of `fanlight run`.
#[derive(Args, Debug)]
pub struct RunOptions {
    /// Machine as JSON, with the options' names as fields; options given beside it win, and disks, network
    /// interfaces and passed-through devices add to it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Kernel: a bzImage, or an ELF vmlinux with a PVH entry
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathOrFd>,
    /// Initial RAM disk [default: none]
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathOrFd>,
    /// Kernel command line [default: "console=ttyS0 panic=-1"]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Who decompresses a bzImage: host or guest [default: host]
    #[arg(long, value_name = "WHO", value_parser = word::<KernelUnpack>)]
    unpack: Option<KernelUnpack>,
    /// Number of virtual CPUs [default: 1]
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Guest RAM, with K, M or G; hugepages is 2M or 1G [default: 512M]
    #[arg(long, value_name = "SIZE[,hugepages=SIZE]")]
    memory: Option<MemoryConfig>,
    /// Disk; may be given several times. Without a format the image is raw. serial is its identity in the
    /// guest, port a PCIe root port to put it behind
    #[arg(
        long,
        value_name = "path=FILE[,readonly=on][,format=raw|qcow2][,serial=TEXT][,port=N]"
    )]
    disk: Vec<DiskConfig>,
    /// Network interface on a tap of the host; may be given several times. The address is made from the
    /// tap's name [default: vhost-net where the host has it]
    #[arg(long, value_name = "tap=NAME[,mac=ADDRESS][,vhost=on|off][,port=N]")]
    net: Vec<NetConfig>,
    /// PCI device of the host's to pass through, bound to vfio-pci; may be given several times. iommufd says
    /// whether DMA goes through that, or through VFIO's older container; iommu and group are nodes of either, for
    /// who has them open [default: auto]
    #[arg(
        long,
        value_name = "ADDRESS[,iommufd=auto|on|off][,iommu=NODE][,group=NODE][,id=NAME][,port=N]"
    )]
    vfio: Vec<VfioConfig>,
    /// Sockets between host and guest, with the guest's context id, from 3 on [default: none]
    #[arg(long, value_name = "cid=N")]
    vsock: Option<VsockConfig>,
    /// First serial port: stdio, null, file=PATH or socket=PATH. Ctrl-A x leaves stdio [default: stdio]
    #[arg(long, value_name = "WHERE")]
    serial: Option<CharBackend>,
    /// Virtio console (hvc0 in the guest): stdio, null, file=PATH or socket=PATH [default: none]
    #[arg(long, value_name = "WHERE")]
    console: Option<ConsoleConfig>,
    /// Virtio entropy device: on or off [default: on]
    #[arg(long, value_name = "on|off")]
    rng: Option<RngConfig>,
    /// Virtio GPU with a keyboard, a pointer and a touch screen; several may be given. outputs are the screens
    /// plugged in at first, up to 16; renderer has virglrenderer draw OpenGL and Vulkan [default: none; of a GPU:
    /// outputs=1280x800,edid-name=Fanlight,max-resource-memory=256M,renderer=none,hostmem=256M]
    #[arg(
        long,
        value_name = "outputs=WxH[+WxH...][,edid-name=TEXT][,max-resource-memory=SIZE][,renderer=none|virgl|venus|venus+virgl][,hostmem=SIZE][,port=N]",
        num_args = 0..=1,
        default_missing_value = ""
    )]
    gpu: Vec<GpuConfig>,
    /// When the guest asks for a reset: restart or exit [default: restart]
    #[arg(long, value_name = "WHAT", value_parser = word::<OnReset>)]
    on_reset: Option<OnReset>,
    /// When the guest's kernel panics: exit, restart or continue [default: exit]
    #[arg(long, value_name = "WHAT", value_parser = word::<OnPanic>)]
    on_panic: Option<OnPanic>,
    /// Empty PCIe root ports for devices that are added later [default: 4 with --api-socket, else 0]
    #[arg(long, value_name = "N")]
    hotplug_ports: Option<u8>,
    /// The hypervisor, or fd:N [default: /dev/kvm]
    #[arg(long, value_name = "FILE")]
    kvm: Option<PathOrFd>,
    /// UNIX socket to serve the control API on [default: none]
    #[arg(long, value_name = "S", value_hint = clap::ValueHint::FilePath)]
    pub api_socket: Option<PathBuf>,
    #[command(flatten)]
    pub api: ApiOptions,
    #[command(flatten)]
    pub log: LogOptions,
}

/// Reads one of an enumeration's words by its serde names.
fn word<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(serde_json::Value::String(text.into())).map_err(|e| e.to_string())
}

/// Why the options describe no machine.
#[derive(Debug, Error)]
pub enum OptionsError {
    /// The file cannot be read.
    #[error("--config {}: cannot read it", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The file is not a machine.
    #[error("--config {}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
}

impl RunOptions {
    /// The machine: the configuration file's, changed by the options.
    pub fn into_config(self) -> Result<VmConfig, OptionsError> {
        let mut config = match self.config {
            None => VmConfig::default(),
            Some(path) => {
                let text = std::fs::read_to_string(&path).map_err(|source| OptionsError::Read {
                    path: path.clone(),
                    source,
                })?;
                serde_json::from_str(&text)
                    .map_err(|source| OptionsError::Parse { path, source })?
            }
        };
        fn set<T>(field: &mut T, option: Option<T>) {
            if let Some(value) = option {
                *field = value;
            }
        }
        set(&mut config.kernel, self.kernel.map(Some));
        set(&mut config.initrd, self.initrd.map(Some));
        set(&mut config.cmdline, self.cmdline);
        set(&mut config.unpack, self.unpack);
        set(&mut config.cpus, self.cpus);
        set(&mut config.memory, self.memory);
        config.disk.extend(self.disk);
        config.net.extend(self.net);
        config.vfio.extend(self.vfio);
        config.gpu.extend(self.gpu);
        set(&mut config.vsock, self.vsock.map(Some));
        set(&mut config.serial, self.serial);
        set(&mut config.console, self.console.map(Some));
        set(&mut config.rng, self.rng);
        set(&mut config.on_reset, self.on_reset);
        set(&mut config.on_panic, self.on_panic);
        set(&mut config.hotplug_ports, self.hotplug_ports.map(Some));
        set(&mut config.kvm, self.kvm.map(Some));
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn parse(arguments: &[&str]) -> Result<VmConfig, String> {
        let command = ["fanlight", "run"].iter().chain(arguments);
        let options = Options::try_parse_from(command).map_err(|e| e.to_string())?;
        let Command::Run(options) = options.command else {
            return Err("not run".into());
        };
        options
            .into_config()
            .map_err(|error| fanlight_devices::error_line(&error))
    }

    #[test]
    fn options_win_over_the_file_and_lists_add() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write!(
            file,
            r#"{{"kernel": "a", "cpus": 4, "disk": [{{"path": "d1"}}]}}"#
        )
        .unwrap();
        let path = file.path().to_str().unwrap();
        let config = parse(&["--config", path, "--cpus", "2", "--disk", "path=d2"]).unwrap();
        assert_eq!(config.kernel, Some("a".into()));
        assert_eq!(config.cpus, 2);
        assert_eq!(config.disk.len(), 2);
    }

    #[test]
    fn completions_are_made_for_every_shell() {
        use clap::{CommandFactory, ValueEnum};
        for shell in clap_complete::Shell::value_variants() {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Options::command(), "fanlight", &mut text);
            assert!(
                String::from_utf8(text).unwrap().contains("api-socket"),
                "{shell}"
            );
        }
    }

    #[test]
    fn a_gpu_needs_no_value() {
        let plain = parse(&["--gpu", "--cpus", "2"]).unwrap();
        assert_eq!(plain.gpu, [GpuConfig::default()]);
        let two = parse(&["--gpu", "outputs=640x480+800x600"]).unwrap();
        assert_eq!(two.gpu[0].outputs.0.len(), 2);
        let cards = parse(&["--gpu", "--gpu", "800x600,renderer=venus", "--cpus", "2"]).unwrap();
        assert_eq!(cards.gpu.len(), 2);
        assert!(
            parse(&["--gpu", "outputs=big"])
                .unwrap_err()
                .contains("1920x1080")
        );
    }

    #[test]
    fn mistakes_are_named() {
        assert!(parse(&["--memory", "lots"]).unwrap_err().contains("size"));
        assert!(parse(&["--disk", "pth=x"]).unwrap_err().contains("pth"));
        assert!(
            parse(&["--on-reset", "shrug"])
                .unwrap_err()
                .contains("shrug")
        );
        assert!(
            parse(&["--rng", "maybe"])
                .unwrap_err()
                .contains("on nor off")
        );
        let error = parse(&["--config", "/nowhere"]).unwrap_err();
        assert!(error.starts_with("--config /nowhere: cannot read it"));
    }
}
