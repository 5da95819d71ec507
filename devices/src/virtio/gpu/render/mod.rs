//! 3D (Virtio 1.4, 5.7.6.9): commands for a renderer in a process of its own, which alone hands the guest's
//! command streams to code that is not Rust's.
//!
//! The device checks what a command names, sends it on, and takes no other from the control queue until the
//! renderer has answered; its thread never waits for it, so that a renderer that hangs holds up the guest's
//! 3D and nothing else. Fences are passed when the renderer says so, in any order between rings.
//!
//! A renderer that ends is not started again while the driver lives: its contexts are lost, and all that
//! needs it is answered with an error. The next driver gets a new one.

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
