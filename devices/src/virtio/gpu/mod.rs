//! GPU device (Virtio 1.4, 5.7): 2D, with blobs of guest memory that leave as dma-bufs, and 3D for a renderer.
//!
//! `protocol` is the wire, `commands` what each command does, `resources` what the driver has us remember,
//! [`Frame`] the way out, [`DisplayHandle`] the host's side, `render` the way to a renderer. Without one there
//! is no VIRGL: Linux imports other devices' dma-bufs only into a device without it.
//!
//! One thread serves both queues; it and the host's side share one state behind a lock that is held for the
//! time of a command.

mod budget;
mod commands;
mod cursor;
mod device;
mod display;
mod edid;
mod format;
mod frame_copy;
mod output;
#[allow(missing_docs, reason = "the specification has it")]
pub mod protocol;
pub mod render;
mod resource;
mod scanout;
#[cfg(any(test, feature = "test-util"))]
pub mod stream_check;
#[cfg(test)]
mod tests;
mod transfer;
mod watch;

pub use commands::BLOB_ALIGNMENT;
pub use cursor::{Cursor, CursorImage, SIZE as CURSOR_SIZE};
pub use device::Gpu;
pub use display::{
    DisplayConfig, DisplayError, DisplayEvent, DisplayHandle, ExportedResource, OutputInfo,
    Statistics, Subscription,
};
pub use edid::{NAME_MAX, edid};
pub use format::{DRM_FORMAT_MOD_LINEAR, FORMATS, Format};
pub use frame_copy::{FrameCopy, MAX_COPIES};
pub use output::{Mode, OUTPUTS, Output};
pub use scanout::{Area, ExportedImage, Frame, FrameError, ImageMemory, Layout, Location, Pixels};
pub use watch::PATIENCE;
