//! What a machine is made of. Field names are those of the command line's options.

use std::{path::PathBuf, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    gpu::GpuConfig,
    or_fd::{OrFd, PathOrFd},
    size::ByteSize,
    spec::{self, SpecError},
};

/// A machine.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// Kernel image: a bzImage, or an ELF vmlinux with a PVH entry.
    pub kernel: Option<PathOrFd>,
    /// Initial RAM disk.
    pub initrd: Option<PathOrFd>,
    /// Kernel command line.
    pub cmdline: String,
    /// Who decompresses a bzImage.
    pub unpack: KernelUnpack,
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// Guest RAM.
    pub memory: MemoryConfig,
    /// Virtio block devices, in the guest's order.
    pub disk: Vec<DiskConfig>,
    /// Virtio network devices, in the guest's order.
    pub net: Vec<NetConfig>,
    /// Passed-through PCI devices of the host's, in the guest's order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vfio: Vec<VfioConfig>,
    /// Virtio socket device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// The first serial port.
    pub serial: CharBackend,
    /// The virtio console; none if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleConfig>,
    /// The virtio entropy device.
    pub rng: RngConfig,
    /// Virtio GPUs, in the guest's order, with a keyboard, a pointer and a touch screen for them all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gpu: Vec<GpuConfig>,
    /// What happens when the guest asks for a restart.
    pub on_reset: OnReset,
    /// What happens when the guest's kernel panics.
    pub on_panic: OnPanic,
    /// Empty PCIe root ports, where devices can be added while the machine runs: 4 if absent and the
    /// machine has an API, else none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplug_ports: Option<u8>,
    /// The hypervisor: `/dev/kvm` if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kvm: Option<PathOrFd>,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            kernel: None,
            initrd: None,
            cmdline: Self::DEFAULT_CMDLINE.into(),
            unpack: KernelUnpack::default(),
            cpus: 1,
            memory: MemoryConfig::default(),
            disk: Vec::new(),
            net: Vec::new(),
            vfio: Vec::new(),
            vsock: None,
            serial: CharBackend::default(),
            console: None,
            rng: RngConfig::default(),
            gpu: Vec::new(),
            on_reset: OnReset::default(),
            on_panic: OnPanic::default(),
            hotplug_ports: None,
            kvm: None,
        }
    }
}

impl VmConfig {
    /// The kernel command line where none is given: a console, and a restart after a panic, which
    /// is what lets a guest without a panic device end.
    pub const DEFAULT_CMDLINE: &'static str = "console=ttyS0 panic=-1";
}

/// Who decompresses a bzImage.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelUnpack {
    /// Fanlight does, where it knows the format: the guest starts in the kernel proper.
    #[default]
    Host,
    /// The guest does, by the code in front of its kernel.
    Guest,
}

/// Guest RAM.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// How much.
    pub size: ByteSize,
    /// Size of the huge pages to take it from: 2M or 1G; ordinary pages if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepages: Option<ByteSize>,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: ByteSize(512 << 20),
            hugepages: None,
        }
    }
}

impl FromStr for MemoryConfig {
    type Err = SpecError;
    fn from_str(text: &str) -> Result<Self, SpecError> {
        spec::parse(text, Some("size"))
    }
}

/// A virtio block device.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Image file or block device.
    pub path: PathOrFd,
    /// Its name for the API: `disk0`, `disk1`, … if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Whether the guest may only read.
    #[serde(default)]
    pub readonly: bool,
    /// Image format.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// What the guest reads as the disk's serial number, at most 20 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// PCIe root port to place the device behind; on the root bus if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u8>,
}

impl FromStr for DiskConfig {
    type Err = SpecError;
    fn from_str(text: &str) -> Result<Self, SpecError> {
        spec::parse(text, Some("path"))
    }
}

/// Format of a disk image.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The file's bytes are the disk's.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

/// A virtio network device.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Name of the host's tap interface.
    pub tap: OrFd<String>,
    /// Its name for the API: `net0`, `net1`, … if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The guest's hardware address; made from the tap's name if absent; of a tap given open, new with each process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Whether the kernel's vhost-net moves the packets: where it is there, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost: Option<bool>,
    /// PCIe root port to place the device behind; on the root bus if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u8>,
}

impl FromStr for NetConfig {
    type Err = SpecError;
    fn from_str(text: &str) -> Result<Self, SpecError> {
        spec::parse(text, Some("tap"))
    }
}

/// A PCI device of the host's that is passed through.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VfioConfig {
    /// Where it is on the host, such as 0000:03:00.1; or its node in `/dev/vfio/devices`, open.
    pub device: OrFd<String>,
    /// Whether DMA goes through iommufd, or through VFIO's older container.
    #[serde(default)]
    pub iommufd: Iommufd,
    /// iommufd's node for all devices of the machine, when the first of them comes: `/dev/iommu` if absent. With `group`
    /// or `iommufd=off` the container's: `/dev/vfio/vfio` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommu: Option<PathOrFd>,
    /// Its group's node, for DMA through the container: the one in `/dev/vfio` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<PathOrFd>,
    /// Its name for the API: `vfio0`, `vfio1`, … if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCIe root port to place the device behind; on the root bus if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u8>,
}

impl FromStr for VfioConfig {
    type Err = SpecError;
    fn from_str(text: &str) -> Result<Self, SpecError> {
        spec::parse(text, Some("device"))
    }
}

/// Whether DMA of passed-through devices goes through iommufd.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Iommufd {
    /// Where the host has it for all devices of the machine.
    #[default]
    Auto,
    /// It does.
    On,
    /// It goes through VFIO's container.
    Off,
}

/// A virtio socket device, served by the host's vhost-vsock.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, from 3 on, unique on the host.
    pub cid: u32,
    /// The host's device: `/dev/vhost-vsock` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<PathOrFd>,
}

impl FromStr for VsockConfig {
    type Err = SpecError;
    fn from_str(text: &str) -> Result<Self, SpecError> {
        spec::parse(text, Some("cid"))
    }
}

/// The virtio entropy device.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RngConfig {
    /// Whether the guest has one.
    pub enabled: bool,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self { enabled: true }
    }
}

impl FromStr for RngConfig {
    type Err = SpecError;
    fn from_str(text: &str) -> Result<Self, SpecError> {
        spec::parse(text, Some("enabled"))
    }
}

/// Where a console's bytes come from and go to.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CharBackend {
    /// Standard input and output. Ctrl-A x ends the machine.
    #[default]
    Stdio,
    /// Output is dropped, there is no input, but for what `console.attach` connects.
    Null,
    /// Output is appended to a file, there is no input.
    File(PathBuf),
    /// A UNIX socket that Fanlight listens on; one client at a time.
    Socket(PathBuf),
}

/// The virtio console.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(transparent)]
pub struct ConsoleConfig(pub CharBackend);

/// Not a console.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is not a console: say stdio, null, file=PATH or socket=PATH")]
pub struct CharBackendError(String);

impl FromStr for CharBackend {
    type Err = CharBackendError;

    fn from_str(text: &str) -> Result<Self, CharBackendError> {
        match text.split_once('=') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "null" => Ok(Self::Null),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err(CharBackendError(text.into())),
        }
    }
}

impl FromStr for ConsoleConfig {
    type Err = CharBackendError;
    fn from_str(text: &str) -> Result<Self, CharBackendError> {
        text.parse().map(Self)
    }
}

/// What happens when the guest asks for a restart.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReset {
    /// The machine restarts in place.
    #[default]
    Restart,
    /// Fanlight ends with a status of its own.
    Exit,
}

/// What happens when the guest's kernel panics.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnPanic {
    /// Fanlight ends with a status of its own.
    #[default]
    Exit,
    /// The machine restarts in place.
    Restart,
    /// The guest goes on as it likes: it may dump itself, or restart.
    Continue,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_object_is_the_default_machine() {
        let config: VmConfig = serde_json::from_str("{}").unwrap();
        assert_eq!(config, VmConfig::default());
    }

    #[test]
    fn a_machine_survives_json() {
        let config = VmConfig {
            kernel: Some("k".into()),
            cpus: 8,
            memory: "2G,hugepages=2M".parse().unwrap(),
            disk: vec!["path=a,readonly=on,format=qcow2".parse().unwrap()],
            net: vec!["tap=t0,mac=02:00:00:00:00:01".parse().unwrap()],
            vfio: vec!["0000:03:00.1,iommufd=off,id=vf0,port=1".parse().unwrap()],
            vsock: Some("cid=3".parse().unwrap()),
            serial: "socket=/s".parse().unwrap(),
            console: Some("file=/f".parse().unwrap()),
            rng: "off".parse().unwrap(),
            gpu: vec!["outputs=800x600+640x480,edid-name=a".parse().unwrap()],
            ..VmConfig::default()
        };
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<VmConfig>(&json).unwrap(), config);
    }

    #[test]
    fn unknown_fields_are_refused() {
        let error = serde_json::from_str::<VmConfig>(r#"{"cpu": 1}"#).unwrap_err();
        assert!(error.to_string().contains("unknown field `cpu`"));
    }
}
