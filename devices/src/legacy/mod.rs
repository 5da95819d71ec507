//! The few devices of a PC that are not on PCI: serial port, clock, i8042 reset, pvpanic and the
//! registers of hardware-reduced ACPI.

mod guest_request;
pub mod i8042;
mod interrupt_line;
pub mod output;
pub mod power;
pub mod pvpanic;
pub mod rtc;
pub mod serial;

#[cfg(test)]
pub(crate) use guest_request::test_util;
pub use guest_request::{GuestRequest, RequestSink};
pub use interrupt_line::InterruptLine;
