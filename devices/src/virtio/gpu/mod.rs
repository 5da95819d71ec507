//! GPU device (Virtio 1.4, 5.7): 2D, blobs of guest memory that are exported as dma-bufs, and 3D through a
//! renderer.
//!
//! Files depend on each other in this order: `protocol`, `format`, `geometry`, `output`, `edid`, `error` →
//! `resource` → `scanout`, `frame`, `frame_copy` → `subscriber` → `state` → `commands` → `render` → `display` →
//! `queues`, `device`.
//!
//! Without a renderer there is no VIRGL feature: Linux imports dma-bufs of other devices only into a device without
//! it.
//!
//! One thread serves both queues. It shares one state with the host side, behind a lock that is held for the time
//! of a command.

mod commands;
mod cursor;
mod device;
mod display;
mod display_subscriber;
mod edid;
mod error;
mod format;
mod frame;
mod frame_copy;
mod geometry;
mod output;
mod pixels;
#[allow(missing_docs, reason = "the specification has it")]
pub mod protocol;
mod queues;
pub mod render;
mod request;
mod resource;
mod response;
mod scanout;
mod state;
#[cfg(any(test, feature = "test-util"))]
pub mod stream_check;
mod subscriber;
#[cfg(test)]
mod tests;
mod transfer;

pub use commands::BLOB_ALIGNMENT;
pub use cursor::{Cursor, CursorImage, SIZE as CURSOR_SIZE};
pub use device::Gpu;
pub use display::{DisplayConfig, DisplayError, DisplayHandle, ExportedResource, OutputInfo};
pub use display_subscriber::{DisplayEvent, DisplaySubscriber};
pub use edid::{NAME_MAX, edid};
pub use format::{DRM_FORMAT_MOD_LINEAR, FORMATS, Format};
pub use frame::{ExportedFrame, Frame, FrameError, FrameMemory};
pub use frame_copy::{FrameCopy, MAX_COPIES};
pub use geometry::{Area, Layout};
pub use output::{Mode, OUTPUTS, Output};
pub use pixels::Pixels;
pub use scanout::Location;
pub use state::Statistics;
pub use subscriber::MAX_FENCE_DELAY;
