//! Resources of the driver: 2D resources, blobs and resources of the renderer.

mod blob;
mod host;
mod host_shown;
mod image;
mod surface;
mod table;

pub use blob::{Blob, BlobMemory};
pub use host::{CopyTo, HostKind};
pub use host_shown::ExportedLayout;
pub use image::Image;
pub use surface::Surface;
pub use table::{Resource, ResourceKind, Resources};
