//! The configuration of a machine. Fields are named as the options of `fanlight run`.

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

/// The configuration of a machine.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// Kernel image: a bzImage, or an ELF vmlinux with a PVH entry.
    pub kernel: Option<PathOrFd>,
    /// Initial RAM disk.
    pub initrd: Option<PathOrFd>,
    /// Kernel command line.
    pub cmdline: String,
    /// Where a bzImage is decompressed.
    pub unpack: KernelUnpack,
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// Guest RAM.
    pub memory: MemoryConfig,
    /// Virtio block devices, in PCI order.
    pub disk: Vec<DiskConfig>,
    /// Virtio network devices, in PCI order.
    pub net: Vec<NetConfig>,
    /// PCI devices of the host to pass through, in PCI order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vfio: Vec<VfioConfig>,
    /// Virtio socket device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// The first serial port (COM1, ttyS0).
    pub serial: CharBackend,
    /// The virtio console (hvc0): none if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleConfig>,
    /// The virtio entropy device.
    pub rng: RngConfig,
    /// Virtio GPUs, in PCI order. They share a keyboard, a pointer and a touch screen.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gpu: Vec<GpuConfig>,
    /// Action when the guest requests a reset.
    pub on_reset: OnReset,
    /// Action when the guest kernel panics.
    pub on_panic: OnPanic,
    /// Empty PCIe root ports for devices that are added while the machine runs: 4 with a control API and 0
    /// without, if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplug_ports: Option<u8>,
    /// Device node of KVM: `/dev/kvm` if absent.
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
    /// The default kernel command line. `panic=-1` restarts a guest whose kernel has no panic device, so that
    /// the machine ends.
    pub const DEFAULT_CMDLINE: &'static str = "console=ttyS0 panic=-1";
}

/// Where a bzImage is decompressed.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelUnpack {
    /// In Fanlight, which is faster. Applies to zstd, gzip, xz and LZ4.
    #[default]
    Host,
    /// In the guest, by the kernel's own loader.
    Guest,
}

/// Guest RAM.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Size of guest RAM.
    pub size: ByteSize,
    /// Page size of reserved huge pages to use, 2M or 1G: transparent huge pages if absent.
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
    /// Image file or block device of the host.
    pub path: PathOrFd,
    /// Name of the device in the API: `disk0`, `disk1`, … if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Whether writes are refused.
    #[serde(default)]
    pub readonly: bool,
    /// Image format: raw if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// Serial number that the guest reads, at most 20 printable ASCII characters: derived from the name if
    /// absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Number of the PCIe root port to plug the device into, from 1 on: the root bus if absent.
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
    /// The file has the disk's bytes, without a header.
    Raw,
    /// QEMU copy-on-write, versions 2 and 3.
    Qcow2,
}

/// A virtio network device.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Tap interface of the host.
    pub tap: OrFd<String>,
    /// Name of the device in the API: `net0`, `net1`, … if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// MAC address of the guest: derived from the name of the tap if absent. A tap given as a descriptor gets a
    /// new address with each process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Whether vhost-net of the kernel moves the packets: if the host has it, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost: Option<bool>,
    /// Number of the PCIe root port to plug the device into, from 1 on: the root bus if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u8>,
}

impl FromStr for NetConfig {
    type Err = SpecError;
    fn from_str(text: &str) -> Result<Self, SpecError> {
        spec::parse(text, Some("tap"))
    }
}

/// A PCI device of the host to pass through.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VfioConfig {
    /// PCI address on the host, such as 0000:03:00.1. A descriptor is an open node of `/dev/vfio/devices`.
    pub device: OrFd<String>,
    /// Whether DMA is mapped through iommufd, or through the older VFIO container.
    #[serde(default)]
    pub iommufd: Iommufd,
    /// Device node of iommufd: `/dev/iommu` if absent. With `group` or `iommufd=off` it is the node of the VFIO
    /// container: `/dev/vfio/vfio` if absent. The first passed-through device decides for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommu: Option<PathOrFd>,
    /// Node of the IOMMU group, for DMA through the container: the node in `/dev/vfio` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<PathOrFd>,
    /// Name of the device in the API: `vfio0`, `vfio1`, … if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Number of the PCIe root port to plug the device into, from 1 on: the root bus if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u8>,
}

impl FromStr for VfioConfig {
    type Err = SpecError;
    fn from_str(text: &str) -> Result<Self, SpecError> {
        spec::parse(text, Some("device"))
    }
}

/// Whether DMA of passed-through devices is mapped through iommufd.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Iommufd {
    /// If the host offers it for every device of the machine.
    #[default]
    Auto,
    /// Through iommufd.
    On,
    /// Through the VFIO container.
    Off,
}

/// A virtio socket device, served by vhost-vsock of the host.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// Context ID (CID) of the guest, from 3 on. It is unique on the host.
    pub cid: u32,
    /// Device node of vhost-vsock: `/dev/vhost-vsock` if absent.
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
    /// Whether the guest has the device.
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

/// The host end of a serial port or console.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CharBackend {
    /// Standard input and output. Ctrl-A x ends the machine.
    #[default]
    Stdio,
    /// No host end. Clients can still connect with the method `console.attach`.
    Null,
    /// Appends output to a file. There is no input.
    File(PathBuf),
    /// A UNIX socket that Fanlight listens on, for one client at a time.
    Socket(PathBuf),
}

/// The virtio console.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(transparent)]
pub struct ConsoleConfig(pub CharBackend);

/// Not the host end of a console.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is not one of stdio, null, file=PATH, socket=PATH")]
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

/// Action when the guest requests a reset.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReset {
    /// Restart the machine in the same process.
    #[default]
    Restart,
    /// End Fanlight with exit status 32.
    Exit,
}

/// Action when the guest kernel panics.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnPanic {
    /// End Fanlight with exit status 33.
    #[default]
    Exit,
    /// Restart the machine in the same process.
    Restart,
    /// Let the guest continue, to write a dump or to reset.
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
