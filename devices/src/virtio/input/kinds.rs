//! The three input devices: their names, keys and axes.

use zerocopy::{Immutable, IntoBytes, little_endian::U16, little_endian::U32};

use super::{codes::*, event::InputEvent};

/// `enum virtio_input_config_select` (5.8.4).
const VIRTIO_INPUT_CFG_ID_NAME: u8 = 0x01;
const VIRTIO_INPUT_CFG_ID_SERIAL: u8 = 0x02;
const VIRTIO_INPUT_CFG_ID_DEVIDS: u8 = 0x03;
const VIRTIO_INPUT_CFG_PROP_BITS: u8 = 0x10;
const VIRTIO_INPUT_CFG_EV_BITS: u8 = 0x11;
const VIRTIO_INPUT_CFG_ABS_INFO: u8 = 0x12;

const BUS_VIRTUAL: u16 = 0x06;
const VENDOR: u16 = 0x1af4;

/// Positions go from 0 to this value, whatever the output's size is.
pub const AXIS_MAX: i32 = 0x7fff;
/// Fingers that the device distinguishes.
pub const TOUCHES: i32 = 10;
const TRACKING_ID_MAX: i32 = 0xffff;

/// `struct virtio_input_absinfo`.
#[derive(IntoBytes, Immutable, Default)]
#[repr(C)]
struct AbsInfo {
    min: U32,
    max: U32,
    fuzz: U32,
    flat: U32,
    res: U32,
}

/// `struct virtio_input_devids`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct DevIds {
    bustype: U16,
    vendor: U16,
    product: U16,
    version: U16,
}

/// A kind of input device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputKind {
    /// Keys and LEDs.
    Keyboard,
    /// An absolute pointer with buttons and two wheels.
    Pointer,
    /// A multi-touch screen.
    Touch,
}

impl InputKind {
    /// Name for logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Keyboard => "keyboard",
            Self::Pointer => "pointer",
            Self::Touch => "touch screen",
        }
    }

    /// The event codes of a type that the device sends or accepts.
    fn codes(self, type_: u16) -> Vec<u16> {
        match (self, type_) {
            (Self::Keyboard, EV_KEY) => (KEY_ESC..=KEY_MICMUTE).collect(),
            (Self::Keyboard, EV_LED) => vec![LED_NUML, LED_CAPSL, LED_SCROLLL],
            // Only the type matters, not the code.
            (Self::Keyboard, EV_REP) => vec![0],
            (Self::Pointer, EV_KEY) => {
                vec![BTN_LEFT, BTN_RIGHT, BTN_MIDDLE, BTN_SIDE, BTN_EXTRA]
            }
            (Self::Pointer, EV_REL) => {
                vec![REL_WHEEL, REL_HWHEEL, REL_WHEEL_HI_RES, REL_HWHEEL_HI_RES]
            }
            (Self::Pointer, EV_ABS) => vec![ABS_X, ABS_Y],
            (Self::Touch, EV_KEY) => vec![BTN_TOUCH],
            (Self::Touch, EV_ABS) => vec![
                ABS_X,
                ABS_Y,
                ABS_MT_SLOT,
                ABS_MT_TRACKING_ID,
                ABS_MT_POSITION_X,
                ABS_MT_POSITION_Y,
            ],
            _ => Vec::new(),
        }
    }

    /// Whether the device can send an event.
    pub(super) fn has(self, event: &InputEvent) -> bool {
        matches!(event.type_, EV_KEY | EV_REL | EV_ABS)
            && self.codes(event.type_).contains(&event.code)
    }

    /// The configuration for a selection (5.8.5); empty if the device has none.
    pub(super) fn describe(self, select: u8, subsel: u8) -> Vec<u8> {
        match (select, subsel) {
            (VIRTIO_INPUT_CFG_ID_NAME, 0) => format!("Fanlight {}", self.name()).into(),
            (VIRTIO_INPUT_CFG_ID_SERIAL, 0) => self.name().into(),
            (VIRTIO_INPUT_CFG_ID_DEVIDS, 0) => DevIds {
                bustype: BUS_VIRTUAL.into(),
                vendor: VENDOR.into(),
                product: (self as u16 + 1).into(),
                version: 1.into(),
            }
            .as_bytes()
            .into(),
            (VIRTIO_INPUT_CFG_PROP_BITS, 0) if self == Self::Touch => bitmap(&[INPUT_PROP_DIRECT]),
            (VIRTIO_INPUT_CFG_EV_BITS, type_) => bitmap(&self.codes(type_.into())),
            (VIRTIO_INPUT_CFG_ABS_INFO, axis) if self.codes(EV_ABS).contains(&u16::from(axis)) => {
                let max = match u16::from(axis) {
                    ABS_MT_SLOT => TOUCHES - 1,
                    ABS_MT_TRACKING_ID => TRACKING_ID_MAX,
                    _ => AXIS_MAX,
                };
                let info = AbsInfo {
                    max: max.cast_unsigned().into(),
                    ..Default::default()
                };
                info.as_bytes().into()
            }
            _ => Vec::new(),
        }
    }
}

/// A bit for each code, without trailing zero bytes.
fn bitmap(codes: &[u16]) -> Vec<u8> {
    let len = codes.iter().max().map_or(0, |max| usize::from(max / 8) + 1);
    let mut bits = vec![0; len];
    for code in codes {
        bits[usize::from(code / 8)] |= 1 << (code % 8);
    }
    bits
}
