//! Input devices (Virtio 1.4, 5.8): a keyboard, an absolute pointer with wheels, and a touch screen. `kinds` lists the
//! properties of each; events are Linux's (`include/uapi/linux/input-event-codes.h`).

mod codes;
mod device;
mod event;
mod kinds;

pub use codes::*;
pub use device::{Input, InputError, InputHandle};
pub use event::InputEvent;
pub use kinds::{AXIS_MAX, InputKind, TOUCHES};
