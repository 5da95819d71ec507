//! The renderer: this program again, in a process of its own, with virglrenderer in it. Command streams of the guest
//! reach C code only there.
//!
//! `launcher` starts the renderer; the other modules run in it. `process` serves the device's requests, and `commands`
//! has the `library` execute them in a `sandbox`.

mod commands;
mod launcher;
mod library;
mod mapping;
pub mod process;
pub mod sandbox;

pub use launcher::{COMMAND, RendererError, RendererLauncher};
