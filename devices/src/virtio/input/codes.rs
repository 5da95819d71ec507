//! Types and codes of events (`include/uapi/linux/input-event-codes.h`), under their names there.

/// Marks the end of a report.
pub const EV_SYN: u16 = 0x00;
/// Keys and buttons.
pub const EV_KEY: u16 = 0x01;
/// Distances.
pub const EV_REL: u16 = 0x02;
/// Positions.
pub const EV_ABS: u16 = 0x03;
/// Lights.
pub const EV_LED: u16 = 0x11;
/// The guest repeats keys that stay pressed.
pub const EV_REP: u16 = 0x14;

/// The report is complete.
pub const SYN_REPORT: u16 = 0;

/// The first key.
pub const KEY_ESC: u16 = 1;
/// A key in the middle of a keyboard.
pub const KEY_A: u16 = 30;
/// The last key of a keyboard; what follows are buttons and special keys.
pub const KEY_MICMUTE: u16 = 248;
/// The pointer's first button.
pub const BTN_LEFT: u16 = 0x110;
/// Its second.
pub const BTN_RIGHT: u16 = 0x111;
/// Its wheel, pressed.
pub const BTN_MIDDLE: u16 = 0x112;
/// A button for the thumb.
pub const BTN_SIDE: u16 = 0x113;
/// Another one.
pub const BTN_EXTRA: u16 = 0x114;
/// Something touches the screen.
pub const BTN_TOUCH: u16 = 0x14a;

/// Horizontal wheel, in notches.
pub const REL_HWHEEL: u16 = 0x06;
/// Wheel, in notches.
pub const REL_WHEEL: u16 = 0x08;
/// Wheel, in 120ths of a notch.
pub const REL_WHEEL_HI_RES: u16 = 0x0b;
/// Horizontal wheel, in 120ths of a notch.
pub const REL_HWHEEL_HI_RES: u16 = 0x0c;

/// From the left.
pub const ABS_X: u16 = 0x00;
/// From the top.
pub const ABS_Y: u16 = 0x01;
/// Which finger the events that follow are of.
pub const ABS_MT_SLOT: u16 = 0x2f;
/// A finger from the left.
pub const ABS_MT_POSITION_X: u16 = 0x35;
/// A finger from the top.
pub const ABS_MT_POSITION_Y: u16 = 0x36;
/// A number for each touch; -1 when the finger leaves.
pub const ABS_MT_TRACKING_ID: u16 = 0x39;

/// Num Lock.
pub const LED_NUML: u16 = 0;
/// Caps Lock.
pub const LED_CAPSL: u16 = 1;
/// Scroll Lock.
pub const LED_SCROLLL: u16 = 2;
/// The last light.
pub const LED_MAX: u16 = 0x0f;

/// What is touched is what is shown.
pub const INPUT_PROP_DIRECT: u16 = 1;
