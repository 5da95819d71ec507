//! The guest's side of a console, in one life of the machine.

use vmm_sys_util::eventfd::EventFd;

/// Gives bytes to the guest; returns how many found room.
type Give = Box<dyn Fn(&[u8]) -> usize>;
/// Tells the guest the terminal's size in columns and rows.
type Resize = Box<dyn Fn(u16, u16)>;

/// A console of the guest: the serial port or the virtio console.
pub struct GuestConsole {
    /// Gives bytes to the guest; returns how many found room.
    pub give: Give,
    /// Tells the guest the terminal's size in columns and rows. Does nothing for a serial port.
    pub resize: Resize,
    /// Signalled when the guest has made room for input.
    pub room: EventFd,
}
