//! Every mapping of an internal error to an error of the API.
//!
//! The matches have no wildcard: an error that is new does not compile until its kind is decided.

use std::io;

use fanlight_api::{ApiError, ErrorKind, methods::MachineCall, types::VmState};
use fanlight_devices::{
    error_line,
    pci::SlotError,
    virtio::gpu::{DisplayError, FrameError},
};

use crate::{
    display::api::CallError,
    vm::{
        devices::disk::ResizeError,
        error::{MachineError, RunError},
        fault::{Classify, Fault},
        hotplug::{AddError, AddFailure},
        pci_topology::TopologyError,
        resources::OpenError,
    },
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

/// The kind of an error, by who is at fault.
fn kind(fault: Fault) -> ErrorKind {
    match fault {
        Fault::Input => ErrorKind::BadInput,
        Fault::Descriptor => ErrorKind::BadDescriptor,
        Fault::Host | Fault::Guest => ErrorKind::HostFailure,
    }
}

/// An error about a field of the parameters, or about all of them.
fn about(error: &impl Classify, field: Option<&str>) -> ApiError {
    let answer = ApiError::new(kind(error.fault()), error_line(error));
    match field {
        Some(field) => answer.at(field),
        None => answer,
    }
}

/// A configuration that makes no machine.
pub fn open(error: &OpenError) -> ApiError {
    about(error, error.field())
}

/// A failure of the machine.
pub fn run(error: &RunError) -> ApiError {
    about(error, error.field())
}

/// A failure of a running machine.
pub fn machine(error: MachineError) -> ApiError {
    run(&error.into())
}

/// The power button cannot be pressed.
pub fn power_button(error: &io::Error) -> ApiError {
    let text = format!("cannot press the power button: {error}");
    ApiError::new(ErrorKind::HostFailure, text)
}

/// A device that cannot be plugged or unplugged.
pub fn topology(error: &TopologyError, field: &str) -> ApiError {
    let kind = match error {
        TopologyError::NotFound(_) => ErrorKind::NotFound,
        TopologyError::Exists(_) | TopologyError::Slot(SlotError::Occupied(_)) => ErrorKind::Exists,
        TopologyError::Slot(SlotError::Busy(_)) => ErrorKind::Busy,
        TopologyError::Slot(SlotError::Empty(_))
        | TopologyError::NoSlot
        | TopologyError::NoPort { .. }
        | TopologyError::Fixed(_)
        | TopologyError::Shared(_)
        | TopologyError::Pci(_)
        | TopologyError::Interrupt(_) => kind(error.fault()),
    };
    ApiError::new(kind, error_line(error)).at(field)
}

/// A `device.add` that cannot be done.
pub fn add(error: &AddError) -> ApiError {
    match &error.cause {
        AddFailure::NotOneDevice => {
            ApiError::new(ErrorKind::InvalidParams, error_line(&error.cause))
        }
        AddFailure::Topology(cause) | AddFailure::Machine(MachineError::Topology(cause)) => {
            topology(cause, &error.field)
        }
        AddFailure::Name(cause) => about(cause, Some(&error.field)),
        AddFailure::Device(cause) => about(cause, Some(&error.field)),
        AddFailure::Machine(cause) => about(cause, Some(&error.field)),
    }
}

/// A disk that keeps its size.
pub fn resize(error: &ResizeError) -> ApiError {
    match error {
        ResizeError::NotFound { id, names } => {
            let names = names.iter().map(String::as_str);
            ApiError::new(ErrorKind::NotFound, error_line(error))
                .at("id")
                .with_nearest(id, names)
        }
        ResizeError::Image { .. } => about(error, Some("size")),
    }
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
