//! 3D (Virtio 1.4, 5.7.6.9): a renderer in a process of its own carries out the commands. Only there do command
//! streams of the guest reach code that is not written in Rust.
//!
//! The device checks what a command names and sends it on. It takes no other command from the control queue until
//! the renderer has replied. Its thread never waits for a reply, so a renderer that hangs delays the 3D of the
//! guest and nothing else. Fences pass when the renderer says so, in any order between rings.
//!
//! A renderer that ended is not started again while the driver lives. Its contexts are lost, and commands that need
//! it fail. The next driver gets a new one.

mod blob_files;
mod commands;
mod completion;
mod host_memory;
mod outputs;
mod process;
mod renderer;
#[cfg(test)]
mod tests;
pub mod wire;

pub(super) use completion::{
    CommandContext, CommandOutcome, Completion, PendingRequest, RendererEvent,
};
pub use host_memory::HostMemory;
pub use process::{Connection, Rendering, StartRenderer};
pub(super) use renderer::Renderer;
pub use wire::ReadBack;
