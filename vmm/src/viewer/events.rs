//! What happens to the window, for the loop that sends it on.

/// What the user or the compositor did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum WindowEvent {
    /// The window was resized.
    Resized {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
    /// A key was pressed or released.
    Key {
        /// `KEY_*` of Linux `input-event-codes.h`.
        code: u32,
        /// Whether it is down now.
        pressed: bool,
    },
    /// The pointer moved.
    Pointer {
        /// From the left, as a part of the window's width: 0 to 1.
        x: f64,
        /// From the top, as a part of the window's height: 0 to 1.
        y: f64,
    },
    /// A pointer button was pressed or released.
    Button {
        /// `BTN_*` of Linux `input-event-codes.h`.
        code: u32,
        /// Whether it is down now.
        pressed: bool,
    },
    /// The wheel was turned, in 120ths of a notch.
    Wheel {
        /// Positive to the right.
        horizontal: i32,
        /// Positive downwards.
        vertical: i32,
    },
    /// A finger touched, moved or left.
    Touch {
        /// The finger's number, as the compositor chose it.
        id: i32,
        /// Its position as parts of the window's size; `None` when it has left.
        at: Option<(f64, f64)>,
    },
    /// The window has shown everything up to this serial, or will never show it.
    Shown {
        /// The serial of the last damage.
        serial: u64,
    },
    /// Neither the compositor nor this process can read the frame: the server must send a copy.
    Unreadable,
    /// The window lost the keyboard focus: all keys are up.
    Unfocused,
    /// The user closed the window.
    Closed,
}
