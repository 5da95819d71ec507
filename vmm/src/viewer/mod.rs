//! `fanlight view`: an output of a guest in a Wayland window.
//!
//! A process of its own, which can be killed at any time: of the guest it has descriptors only.
//!
//! A frame goes from the display stream (`run`) into a buffer of the compositor (`buffers`) that the window shows
//! (`state`). A key press goes from the compositor (`seat`) as a [`WindowEvent`](events::WindowEvent) to `run`, which
//! sends it on the display stream.

mod buffers;
mod cursor;
mod dispatch;
mod events;
mod frame;
mod grab;
mod mapping;
mod run;
mod scroll;
mod seat;
mod state;
mod window;

pub use run::{ViewError, run};
