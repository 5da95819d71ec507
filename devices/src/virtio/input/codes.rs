//! Event types and codes under their Linux names (`include/uapi/linux/input-event-codes.h`).

/// Synchronization: ends a report.
pub const EV_SYN: u16 = 0x00;
/// Keys and buttons.
pub const EV_KEY: u16 = 0x01;
/// Relative movements.
pub const EV_REL: u16 = 0x02;
/// Absolute positions.
pub const EV_ABS: u16 = 0x03;
/// LEDs.
pub const EV_LED: u16 = 0x11;
/// Autorepeat: the guest repeats pressed keys.
pub const EV_REP: u16 = 0x14;

/// The report is complete.
pub const SYN_REPORT: u16 = 0;

/// The first key.
pub const KEY_ESC: u16 = 1;
/// The key A, in the middle of a keyboard.
pub const KEY_A: u16 = 30;
/// The last key of a keyboard; buttons and special keys follow.
pub const KEY_MICMUTE: u16 = 248;
/// The pointer's first button.
pub const BTN_LEFT: u16 = 0x110;
/// The pointer's second button.
pub const BTN_RIGHT: u16 = 0x111;
/// The pressed wheel.
pub const BTN_MIDDLE: u16 = 0x112;
/// The first thumb button.
pub const BTN_SIDE: u16 = 0x113;
/// The second thumb button.
pub const BTN_EXTRA: u16 = 0x114;
/// A finger touches the screen.
pub const BTN_TOUCH: u16 = 0x14a;

/// Horizontal wheel, in notches.
pub const REL_HWHEEL: u16 = 0x06;
/// Wheel, in notches.
pub const REL_WHEEL: u16 = 0x08;
/// Wheel, in 120ths of a notch.
pub const REL_WHEEL_HI_RES: u16 = 0x0b;
/// Horizontal wheel, in 120ths of a notch.
pub const REL_HWHEEL_HI_RES: u16 = 0x0c;

/// Position from the left edge.
pub const ABS_X: u16 = 0x00;
/// Position from the top edge.
pub const ABS_Y: u16 = 0x01;
/// The touch slot to which the following events belong.
pub const ABS_MT_SLOT: u16 = 0x2f;
/// Position of a finger from the left edge.
pub const ABS_MT_POSITION_X: u16 = 0x35;
/// Position of a finger from the top edge.
pub const ABS_MT_POSITION_Y: u16 = 0x36;
/// A number for each touch; -1 when the finger leaves.
pub const ABS_MT_TRACKING_ID: u16 = 0x39;

/// Num Lock.
pub const LED_NUML: u16 = 0;
/// Caps Lock.
pub const LED_CAPSL: u16 = 1;
/// Scroll Lock.
pub const LED_SCROLLL: u16 = 2;
/// The last LED.
pub const LED_MAX: u16 = 0x0f;

/// Direct input: touch positions are screen positions.
pub const INPUT_PROP_DIRECT: u16 = 1;
