//! Parameters and results of methods, and events.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ByteSize, DiskConfig, NetConfig, VfioConfig};

/// A method without parameters.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NoParams {}

/// The result of a method that returns nothing else.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct Done {}

/// The server and its version.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct Version {
    /// Version of the program.
    pub fanlight: String,
    /// Version of the API: major.minor. Within a major version names and meanings stay.
    pub api: String,
    /// The server's process id.
    pub pid: u32,
}

/// Where a machine is in its life.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// There is no machine.
    #[default]
    None,
    /// Its files and devices of the host are open; it has not started.
    Created,
    /// It runs.
    Running,
    /// Its processors and its clock are stopped.
    Paused,
    /// It has ended.
    Stopped,
}

impl std::fmt::Display for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            VmState::None => "none",
            VmState::Created => "created",
            VmState::Running => "running",
            VmState::Paused => "paused",
            VmState::Stopped => "stopped",
        })
    }
}

/// How a machine ended.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum VmEnding {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset, and `on_reset` is `exit`.
    Reset,
    /// The guest's kernel panicked, and `on_panic` is `exit`.
    Panicked,
    /// It was stopped without asking the guest.
    Stopped,
    /// Fanlight could not go on.
    Failed,
}

/// The machine in short.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct VmInfo {
    /// Where it is in its life.
    pub state: VmState,
    /// How it ended, if it is stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ending: Option<VmEnding>,
    /// Number of virtual CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// Guest RAM in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// How often the guest has restarted.
    pub resets: u64,
}

/// The state after a change of it.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct StateNow {
    /// Where the machine is in its life.
    pub state: VmState,
}

/// How a machine ended, for `vm.wait`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct Ended {
    /// How.
    pub ending: VmEnding,
    /// The exit status of `fanlight run` for this ending.
    pub exit_status: u8,
    /// What failed, if something did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Exits of one vCPU to user space, by reason.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct VcpuStats {
    /// Index.
    pub vcpu: u32,
    /// Reads of ports.
    pub io_in: u64,
    /// Writes to ports.
    pub io_out: u64,
    /// Reads of device memory.
    pub mmio_read: u64,
    /// Writes to device memory.
    pub mmio_write: u64,
    /// Interruptions by other threads.
    pub interrupted: u64,
    /// Everything else.
    pub other: u64,
}

/// Counters of a device's queue.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct QueueStats {
    /// Index in the device.
    pub queue: u16,
    /// Requests that were answered.
    pub requests: u64,
    /// Bytes that the device read from the guest.
    pub bytes_from_guest: u64,
    /// Bytes that the device wrote to the guest.
    pub bytes_to_guest: u64,
}

/// Counters of a device.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct DeviceStats {
    /// The device's name.
    pub id: String,
    /// How often it needed a reset, because its driver broke the specification or the host failed.
    pub errors: u64,
    /// Its queues; all zero if the host's kernel serves them (vhost).
    pub queues: Vec<QueueStats>,
}

/// Memory.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct MemoryStats {
    /// Guest RAM in bytes.
    pub guest: u64,
    /// How much of it the guest has touched, in bytes.
    pub guest_allocated: u64,
    /// The process's resident memory in bytes, guest RAM that it has mapped included.
    pub resident: u64,
}

/// Counters of a GPU since the machine was created.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct GpuStats {
    /// Flushes that the guest asked for.
    pub flushes: u64,
    /// Bytes of pixels that were copied: for flushes of resources that are not blobs, for pictures, and for viewers
    /// that get no dma-buf.
    pub copied: u64,
    /// Host memory that the guest's resources hold, in bytes.
    pub resource_memory: u64,
}

/// Counters of the machine since it was booted or last reset.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct VmStats {
    /// Each vCPU.
    pub vcpus: Vec<VcpuStats>,
    /// Each device.
    pub devices: Vec<DeviceStats>,
    /// Memory.
    pub memory: MemoryStats,
    /// Each GPU, by its number.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<GpuStats>,
}

/// A BAR.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct Bar {
    /// Register index, 0 to 5.
    pub index: u8,
    /// `io`, `memory32` or `memory64`.
    pub kind: String,
    /// Its address in the guest; absent if it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<u64>,
    /// Size in bytes.
    pub size: u64,
}

/// A device.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct Device {
    /// Its name, for other methods.
    pub id: String,
    /// Its kind: `block`, `net`, …
    pub kind: String,
    /// PCI address as the guest sees it: `0000:01:00.0`. The bus number is the guest's.
    pub address: String,
    /// The root port of the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u8>,
    /// BARs.
    pub bars: Vec<Bar>,
    /// Feature bits that the device offers, in hexadecimal.
    pub offered_features: String,
    /// Feature bits that its driver took, in hexadecimal; zero without a driver.
    pub driver_features: String,
    /// Whether a driver runs it.
    pub active: bool,
    /// Whether the guest was asked to release it.
    pub removing: bool,
}

/// All devices.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct DeviceList {
    /// In the order in which they were added.
    pub devices: Vec<Device>,
    /// Root ports with nothing behind them, where devices can be added.
    pub free_ports: Vec<u8>,
}

/// A device to add: one of them.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct AddDevice {
    /// A virtio block device. Without a port it takes the first free one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskConfig>,
    /// A virtio network device. Without a port it takes the first free one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net: Option<NetConfig>,
    /// A PCI device of the host. Without a port it takes the first free one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vfio: Option<VfioConfig>,
}

/// A device that was added.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct Added {
    /// Its name.
    pub id: String,
    /// The root port of the device.
    pub port: u8,
}

/// Names a device.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceId {
    /// The device's name, as `device.list` has it.
    pub id: String,
}

/// A disk's new size.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeDisk {
    /// The disk's name.
    pub id: String,
    /// The new size: a multiple of 512 bytes, and not smaller than it is.
    pub size: ByteSize,
}

/// A disk's size.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct DiskSize {
    /// In bytes.
    pub size: u64,
}

/// A console of the machine.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleName {
    /// The first serial port.
    #[default]
    Serial,
    /// The virtio console.
    Console,
}

/// Which console to attach to.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct AttachConsole {
    /// The console.
    pub console: ConsoleName,
}

/// A descriptor that came with the reply.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct Attached {
    /// Its index among the message's descriptors: a stream socket with the console's input and output.
    pub fd: u32,
}

/// What to log.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct LogLevel {
    /// `error`, `warn`, `info`, `debug`, `trace`, or module=level pairs, as `--log` takes them.
    pub level: String,
}

/// Which events to send.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Subscribe {
    /// Names of events; all if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub events: Option<Vec<EventName>>,
}

/// A subscription.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct Subscribed {
    /// Number of the last event before the subscription; 0 if there was none.
    pub sequence: u64,
}

/// Names of events.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EventName {
    /// The machine runs.
    Booted,
    /// Processors and clock are stopped.
    Paused,
    /// Processors and clock run again.
    Resumed,
    /// The machine has ended; `ending` says how.
    Shutdown,
    /// The guest restarts.
    Reset,
    /// The guest's kernel panicked.
    Panic,
    /// A device needs a reset by its driver; `device` names it.
    DeviceError,
    /// A device was plugged into a slot; `device` names it.
    DeviceAdded,
    /// A device was removed: the guest has released it, or the host has taken it. `device` names it.
    DeviceRemoved,
    /// The host wants a passed-through device back: its driver is being unbound, or its physical function goes. The
    /// guest is asked to release it. The host asks again after ten seconds; then the device is removed by force.
    /// `device` names it.
    DeviceRequested,
    /// A disk has a new size; `device` names it.
    DiskResized,
}

/// Something that happened: the parameters of the notification `event`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct Event {
    /// 1 for the server's first event, and one more for each that follows, whether sent to this client or not.
    pub sequence: u64,
    /// CLOCK_MONOTONIC of the host when it happened, in nanoseconds.
    pub monotonic_ns: u64,
    /// Events of this subscriber that were dropped before this one, because it did not read them.
    pub lost: u64,
    /// What happened.
    pub event: EventName,
    /// The device that it happened to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// How the machine ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ending: Option<VmEnding>,
}
