//! Every mapping of an internal error to an error of the API.
//!
//! The matches have no wildcard: an error that is new does not compile until its kind is decided.

use std::io;

use fanlight_api::{ApiError, ErrorKind, methods::MachineCall, types::VmState};
use fanlight_devices::{
    error_line,
    pci::SlotError,
    vfio::VfioError,
    virtio::gpu::{DisplayError, FrameError},
};

use crate::{
    display::api::CallError, host::resources::ConfigError, vm::error::LifeError,
    vm::machine::MachineError, vm::passthrough::PassthroughError, vm::pci_topology::InventoryError,
};

/// A call that the machine's state forbids.
pub fn forbidden(call: &MachineCall, state: VmState) -> ApiError {
    wrong_state(call.name(), state, required_state(call))
}

/// The state that a call needs, for people.
fn required_state(call: &MachineCall) -> &'static str {
    match call {
        MachineCall::VmCreate(_) => "no machine may be there, or it must be stopped",
        MachineCall::VmBoot(_) => "it must be created",
        MachineCall::VmResume(_) => "it must be paused",
        MachineCall::VmPause(_) | MachineCall::VmPowerButton(_) | MachineCall::VmNmi(_) => {
            "it must be running"
        }
        MachineCall::VmStop(_) | MachineCall::ConsoleAttach(_) => {
            "it must be created, running or paused"
        }
        MachineCall::VmWait(_) => MUST_BE_CREATED,
        MachineCall::VmReset(_)
        | MachineCall::VmStats(_)
        | MachineCall::DeviceList(_)
        | MachineCall::DeviceAdd(_)
        | MachineCall::DeviceRemove(_)
        | MachineCall::DiskResize(_) => MUST_BE_THERE,
    }
}

const MUST_BE_CREATED: &str = "a machine must have been created";
const MUST_BE_THERE: &str = "it must be running or paused";

fn wrong_state(method: &str, state: VmState, required: &str) -> ApiError {
    let is = match state {
        VmState::None => "there is no machine".into(),
        state => format!("the machine is {state}"),
    };
    ApiError::new(ErrorKind::WrongState, format!("{method}: {is}; {required}"))
}

/// A call that needs a machine, before one was created.
pub fn no_machine(method: &str) -> ApiError {
    wrong_state(method, VmState::None, MUST_BE_CREATED)
}

/// A call of a display while the machine does not run.
pub fn display_state(method: &str, state: VmState) -> ApiError {
    wrong_state(method, state, MUST_BE_THERE)
}

/// A start that another call put an end to.
pub fn ended_before_start() -> ApiError {
    ApiError::new(ErrorKind::WrongState, "the machine ended")
}

/// A GPU that the machine does not have: it has `count` of them.
pub fn no_gpu(gpu: u32, count: usize) -> ApiError {
    match count.checked_sub(1) {
        None => ApiError::new(
            ErrorKind::NotFound,
            "the machine has no GPU; create it with the field gpu",
        ),
        Some(last) => ApiError::new(
            ErrorKind::NotFound,
            format!("there is no GPU {gpu}: the last one is {last}"),
        )
        .at("gpu"),
    }
}

/// A call that a display refuses.
pub fn display(error: &CallError) -> ApiError {
    let (kind, field) = match error {
        CallError::Display(error) => match error {
            DisplayError::NoOutput(_) => (ErrorKind::NotFound, Some("output")),
            DisplayError::BadMode(_) => (ErrorKind::InvalidParams, Some("mode")),
            DisplayError::Dark(_) | DisplayError::Gone(_) => {
                (ErrorKind::WrongState, Some("output"))
            }
            DisplayError::NoResource(_) => (ErrorKind::NotFound, Some("resource")),
            DisplayError::Frame(FrameError::Export(_)) => (ErrorKind::BadInput, Some("output")),
            DisplayError::Frame(
                FrameError::Read(_)
                | FrameError::TooManyCopies { .. }
                | FrameError::Copy(_)
                | FrameError::Duplicate(_),
            ) => (ErrorKind::HostFailure, Some("output")),
        },
        CallError::Mode(_) => (ErrorKind::InvalidParams, Some("mode")),
        CallError::TooManyCalls | CallError::TooManyStreams => (ErrorKind::Busy, None),
        CallError::WriteFile { .. } | CallError::MakeFile(_) => {
            (ErrorKind::HostFailure, Some("file"))
        }
        CallError::Stream(_) => (ErrorKind::HostFailure, None),
    };
    let api_error = ApiError::new(kind, error_line(error));
    match field {
        Some(field) => api_error.at(field),
        None => api_error,
    }
}

/// A filter of the log that cannot be read.
pub fn log_level(error: String) -> ApiError {
    ApiError::new(ErrorKind::InvalidParams, error).at("level")
}

/// A failure of the machine.
pub fn life(error: &LifeError) -> ApiError {
    let kind = if error.is_bad_input() {
        ErrorKind::BadInput
    } else {
        ErrorKind::HostFailure
    };
    ApiError::new(kind, error_line(error))
}

/// A failure of a running machine.
pub fn machine(error: MachineError) -> ApiError {
    life(&error.into())
}

/// The power button cannot be pressed.
pub fn power_button(error: &io::Error) -> ApiError {
    let text = format!("cannot press the power button: {error}");
    ApiError::new(ErrorKind::HostFailure, text)
}

/// A configuration that makes no machine or no device. `field` is empty for the whole of it.
pub fn config(error: &ConfigError, field: &str) -> ApiError {
    let kind = match error {
        ConfigError::Descriptor { .. } => ErrorKind::BadDescriptor,
        ConfigError::Vfio(error) => passthrough_kind(error),
        ConfigError::NoKernel
        | ConfigError::Open { .. }
        | ConfigError::NotAFile { .. }
        | ConfigError::HugePages(_)
        | ConfigError::Ram(_)
        | ConfigError::Disk(_)
        | ConfigError::Serial(_)
        | ConfigError::Tap(_)
        | ConfigError::Mac(_)
        | ConfigError::Requests(_)
        | ConfigError::Graphics(_)
        | ConfigError::TwoConsoles
        | ConfigError::Console(_)
        | ConfigError::Vsock(_)
        | ConfigError::Id(_)
        | ConfigError::IdTaken(_)
        | ConfigError::Port(_) => ErrorKind::BadInput,
    };
    let error = ApiError::new(kind, error_line(error));
    if field.is_empty() {
        error
    } else {
        error.at(field)
    }
}

/// The kind of a fault in the configuration of a passed-through device.
fn passthrough_kind(error: &PassthroughError) -> ErrorKind {
    match error {
        PassthroughError::Descriptor(_) | PassthroughError::NotANode(_) => ErrorKind::BadDescriptor,
        PassthroughError::Vfio(error) => vfio_kind(error),
        PassthroughError::Address(_)
        | PassthroughError::Twice(_)
        | PassthroughError::Present(_)
        | PassthroughError::BothInterfaces
        | PassthroughError::NodeInContainer
        | PassthroughError::SecondIommu
        | PassthroughError::OpenNode { .. } => ErrorKind::BadInput,
    }
}

fn vfio_kind(error: &VfioError) -> ErrorKind {
    match error {
        VfioError::NotAContainer
        | VfioError::NotAGroup(_)
        | VfioError::NotInGroup(_)
        | VfioError::GroupInContainer(_) => ErrorKind::BadDescriptor,
        VfioError::NoDevice(_)
        | VfioError::NotBound { .. }
        | VfioError::NoIommu(_)
        | VfioError::NotViable { .. }
        | VfioError::Busy(_)
        | VfioError::Permission(_)
        | VfioError::NoNode { .. }
        | VfioError::UnsafeInterrupts
        | VfioError::MemoryLock { .. }
        | VfioError::OutOfReach { .. }
        | VfioError::Broken { .. }
        | VfioError::Msix(_)
        | VfioError::DmaBuf(_)
        | VfioError::Library { .. }
        | VfioError::Device { .. }
        | VfioError::Host { .. } => ErrorKind::BadInput,
    }
}

/// A device that cannot be plugged or unplugged.
pub fn topology(error: &InventoryError, field: &str) -> ApiError {
    let kind = match error {
        InventoryError::NotFound(_) => ErrorKind::NotFound,
        InventoryError::Exists(_) | InventoryError::Slot(SlotError::Occupied(_)) => {
            ErrorKind::Exists
        }
        InventoryError::Slot(SlotError::Busy(_)) => ErrorKind::Busy,
        InventoryError::Machine(error) if !error.is_bad_input() => ErrorKind::HostFailure,
        InventoryError::Machine(_)
        | InventoryError::Slot(SlotError::Empty(_))
        | InventoryError::NoSlot
        | InventoryError::NoPort { .. }
        | InventoryError::Fixed(_)
        | InventoryError::Shared(_) => ErrorKind::BadInput,
    };
    ApiError::new(kind, error_line(error)).at(field)
}

/// A `device.add` that names no device, or more than one.
pub fn not_one_device() -> ApiError {
    ApiError::new(
        ErrorKind::InvalidParams,
        "device.add takes one device: disk, net or vfio",
    )
}

/// A disk that the machine does not have; `ids` are those that it has.
pub fn no_disk<'a>(id: &str, ids: impl Iterator<Item = &'a str>) -> ApiError {
    let text = format!("there is no disk {id:?}; device.list has their names");
    ApiError::new(ErrorKind::NotFound, text)
        .at("id")
        .with_nearest(id, ids)
}

/// A disk that cannot be `size` bytes long.
pub fn disk_size(id: &str, size: u64, error: &io::Error) -> ApiError {
    let kind = match error.kind() {
        io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported => ErrorKind::BadInput,
        _ => ErrorKind::HostFailure,
    };
    let text = format!("disk {id:?} cannot be {size} bytes: {error}");
    ApiError::new(kind, text).at("size")
}

/// A console that the machine does not have.
pub fn no_console() -> ApiError {
    let text = "the machine has no virtio console; give it one with \"console\": \"null\"";
    ApiError::new(ErrorKind::NotFound, text).at("console")
}

/// A console that has another backend.
pub fn console_backend() -> ApiError {
    let text = "the console's backend is stdio or a file; only null and socket can be attached to";
    ApiError::new(ErrorKind::BadInput, text).at("console")
}

/// A client that cannot be connected to a console.
pub fn console_client(error: &io::Error) -> ApiError {
    let (kind, text) = match error.kind() {
        io::ErrorKind::ResourceBusy => (
            ErrorKind::Busy,
            "the console has a client already; it must go first".into(),
        ),
        _ => (
            ErrorKind::HostFailure,
            format!("cannot connect to the console: {error}"),
        ),
    };
    ApiError::new(kind, text).at("console")
}
