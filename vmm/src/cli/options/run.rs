//! Options of `fanlight run`. Those that describe the machine are parsed into the types of `--config`.

use std::path::PathBuf;

use clap::{ArgAction, Args};
use fanlight_api::{
    CharBackend, ConsoleConfig, DiskConfig, GpuConfig, KernelUnpack, MemoryConfig, NetConfig,
    OnPanic, OnReset, PathOrFd, RngConfig, VfioConfig, VmConfig, VsockConfig,
};
use serde::de::DeserializeOwned;
use serde_json::Value as Json;
use thiserror::Error;

use super::{ApiOptions, LogOptions};

const BOOT: &str = "Boot";
const PROCESSORS: &str = "Processors and memory";
const STORAGE: &str = "Storage";
const NETWORK: &str = "Network";
const DISPLAY: &str = "Display";
const DEVICES: &str = "Devices";
/// Heading of the options on control and logging.
pub const CONTROL: &str = "Control";

/// Options of `fanlight run`.
#[derive(Args, Debug)]
pub struct RunOptions {
    /// Read the machine from a JSON file
    ///
    /// Fields have the names of the options, with _ in place of -. An option on the command line wins over its
    /// field. Disks, network interfaces, GPUs and passed-through devices add to those of the file.
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath, help_heading = BOOT)]
    config: Option<PathBuf>,
    /// Kernel image: a bzImage or an ELF vmlinux
    ///
    /// An ELF vmlinux needs a PVH entry (CONFIG_PVH).
    #[arg(long, value_name = "FILE", help_heading = BOOT)]
    kernel: Option<PathOrFd>,
    /// Initial RAM disk [default: none]
    #[arg(long, value_name = "FILE", help_heading = BOOT)]
    initrd: Option<PathOrFd>,
    /// Kernel command line
    ///
    /// The default is "console=ttyS0 panic=-1". With panic=-1 a guest whose kernel has no panic device resets
    /// after a panic; --on-reset then decides.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = BOOT)]
    cmdline: Option<String>,
    /// Where to decompress a bzImage [default: host]
    #[arg(
        long,
        value_name = "host|guest",
        value_parser = word::<KernelUnpack>,
        help_heading = BOOT
    )]
    unpack: Option<KernelUnpack>,
    /// When the guest requests a reset [default: restart]
    #[arg(
        long,
        value_name = "ACTION",
        value_parser = word::<OnReset>,
        help_heading = BOOT
    )]
    on_reset: Option<OnReset>,
    /// When the guest kernel panics [default: exit]
    #[arg(
        long,
        value_name = "ACTION",
        value_parser = word::<OnPanic>,
        help_heading = BOOT
    )]
    on_panic: Option<OnPanic>,
    /// Number of vCPUs, 1 to 254 [default: 1]
    #[arg(long, value_name = "N", help_heading = PROCESSORS)]
    cpus: Option<u32>,
    /// Guest RAM [default: 512M]
    #[arg(long, value_name = "SIZE", help_heading = PROCESSORS)]
    memory: Option<MemoryConfig>,
    /// Device node of KVM [default: /dev/kvm]
    #[arg(long, value_name = "FILE", help_heading = PROCESSORS)]
    kvm: Option<PathOrFd>,
    /// Add a virtio block device; may be repeated
    #[arg(long, value_name = "DISK", help_heading = STORAGE)]
    disk: Vec<DiskConfig>,
    /// Add a virtio network device; may be repeated
    ///
    /// The device is connected to a tap interface of the host.
    #[arg(long, value_name = "NET", help_heading = NETWORK)]
    net: Vec<NetConfig>,
    /// Add a virtio socket device
    ///
    /// Programs of the host and of the guest connect to each other by context ID (CID) and port.
    #[arg(long, value_name = "CID", help_heading = NETWORK)]
    vsock: Option<VsockConfig>,
    /// Add a virtio GPU; may be repeated
    ///
    /// The machine also gets a keyboard, a pointer and a touch screen. Without a value the GPU has one output of
    /// 1280x800 and no 3D. 'fanlight view' shows an output in a window.
    #[arg(
        long,
        value_name = "GPU",
        num_args = 0..=1,
        default_missing_value = "",
        help_heading = DISPLAY
    )]
    gpu: Vec<GpuConfig>,
    /// Pass a PCI device through; may be repeated
    ///
    /// The device must be bound to vfio-pci: see 'fanlight vfio bind'. 'fanlight doctor ADDRESS' checks it.
    #[arg(long, value_name = "DEVICE", help_heading = DEVICES)]
    vfio: Vec<VfioConfig>,
    /// Host end of the serial port [default: stdio]
    ///
    /// The port is COM1, ttyS0 in Linux. With stdio on a terminal, Ctrl-A x stops the machine.
    #[arg(long, value_name = "BACKEND", help_heading = DEVICES)]
    serial: Option<CharBackend>,
    /// Host end of the virtio console [default: none]
    ///
    /// The console is hvc0 in Linux. The serial port and the console cannot both use stdio.
    #[arg(long, value_name = "BACKEND", help_heading = DEVICES)]
    console: Option<ConsoleConfig>,
    /// Virtio entropy device [default: on]
    #[arg(long, value_name = "on|off", help_heading = DEVICES)]
    rng: Option<RngConfig>,
    /// Number of empty PCIe root ports for hot-plug
    ///
    /// The default is 4 with --api-socket, else 0.
    #[arg(long, value_name = "N", help_heading = DEVICES)]
    hotplug_ports: Option<u8>,
    /// Serve the control API on this UNIX socket
    #[arg(
        long,
        value_name = "SOCKET",
        value_hint = clap::ValueHint::FilePath,
        help_heading = CONTROL
    )]
    pub api_socket: Option<PathBuf>,
    #[command(flatten)]
    pub api: ApiOptions,
    #[command(flatten)]
    pub log: LogOptions,
    /// Print help; --help has more than -h
    #[arg(short, long, action = ArgAction::Help, help_heading = CONTROL)]
    help: Option<bool>,
}

/// Reads a word of an enumeration by its serde name.
fn word<T: DeserializeOwned>(text: &str) -> Result<T, serde_json::Error> {
    serde_json::from_value(Json::String(text.into()))
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
    /// The file does not describe a machine.
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
    /// The machine of the configuration file, changed by the options.
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

    use clap::Parser;

    use super::*;
    use crate::options::{Command, Options};

    fn parse(arguments: &[&str]) -> Result<VmConfig, String> {
        let command = ["fanlight", "run"].iter().chain(arguments);
        let options = Options::try_parse_from(command).map_err(|error| error.to_string())?;
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
    fn a_gpu_needs_no_value() {
        let plain = parse(&["--gpu", "--cpus", "2"]).unwrap();
        assert_eq!(plain.gpu, [GpuConfig::default()]);
        let two = parse(&["--gpu", "outputs=640x480+800x600"]).unwrap();
        assert_eq!(two.gpu[0].outputs.0.len(), 2);
        let cards = parse(&["--gpu", "--gpu", "800x600,renderer=venus", "--cpus", "2"]).unwrap();
        assert_eq!(cards.gpu.len(), 2);
    }

    #[test]
    fn errors_of_the_file_name_it() {
        let error = parse(&["--config", "/nowhere"]).unwrap_err();
        assert!(error.starts_with("--config /nowhere: cannot read it"));
        assert_eq!(
            parse(&["--on-reset", "exit", "--unpack", "guest"]).unwrap(),
            VmConfig {
                on_reset: OnReset::Exit,
                unpack: KernelUnpack::Guest,
                ..VmConfig::default()
            }
        );
    }
}
