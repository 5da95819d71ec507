//! The renderer: this program again, in a process of its own, with virglrenderer in it. Command streams of the guest
//! reach C code only there.
//!
//! `launcher` starts it; the rest of this module runs in it: `process` talks to the device, `commands` has the
//! `library` execute what it asks, in a `sandbox`.

mod commands;
mod launcher;
mod library;
mod mapping;
pub mod process;
pub mod sandbox;

pub use launcher::{COMMAND, RendererError, RendererLauncher};
