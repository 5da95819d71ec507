//! Keyboard, pointer and touch screen. A machine with a GPU has all three.

use std::io;

use fanlight_devices::virtio::input::{Input, InputHandle, InputKind};
use thiserror::Error;

use super::{Device, Devices, Failure, Kind, Life, Opened, Opening};
use crate::vm::{
    fault::{Classify, Fault},
    function::Function,
};

/// Keyboard controller, mouse controller and input controller, other (PCI Code and ID Assignment 1.11).
const CLASS_KEYBOARD: u32 = 0x09_0000;
const CLASS_MOUSE: u32 = 0x09_0200;
const CLASS_INPUT_OTHER: u32 = 0x09_8000;

/// Keyboard, pointer and touch screen, in this order.
pub static KIND: Kind = Kind {
    field: "gpu",
    title: "input device",
    open,
    hotplug: None,
};

struct InputDevice(InputHandle);

/// The host has no descriptor left.
#[derive(Debug, Error)]
#[error("cannot make an event descriptor")]
struct InputError(#[from] io::Error);

impl Classify for InputError {
    fn fault(&self) -> Fault {
        Fault::Host
    }
}

fn open(opening: &mut Opening) -> Opened {
    let kinds = [InputKind::Keyboard, InputKind::Pointer, InputKind::Touch];
    let wanted = if opening.config.gpu.is_empty() {
        &[]
    } else {
        kinds.as_slice()
    };
    KIND.open_each(
        wanted,
        |_| None,
        |kind| Ok(InputDevice(InputHandle::new(*kind).map_err(InputError)?)),
    )
}

/// Keyboard, pointer and touch screen, to send events to; none if the machine has no GPU.
pub fn handles(devices: &Devices) -> Option<[InputHandle; 3]> {
    let handles: Vec<_> = devices
        .of()
        .map(|InputDevice(handle)| handle.clone())
        .collect();
    handles.try_into().ok()
}

impl Device for InputDevice {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn id(&self) -> &str {
        match self.0.kind() {
            InputKind::Keyboard => "keyboard",
            InputKind::Pointer => "pointer",
            InputKind::Touch => "touch",
        }
    }

    fn build(&self, life: &mut Life) -> Result<Function, Failure> {
        let class = match self.0.kind() {
            InputKind::Keyboard => CLASS_KEYBOARD,
            InputKind::Pointer => CLASS_MOUSE,
            InputKind::Touch => CLASS_INPUT_OTHER,
        };
        life.virtio(Box::new(Input::new(&self.0)), class)
    }
}
