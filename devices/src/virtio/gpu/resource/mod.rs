//! What the driver has the device remember.

mod blob;
mod host;
mod table;

pub use blob::BlobMemory;
pub use host::{CopyTo, HostKind};
pub use table::{Blob, Image, Kind, MAX_ENTRIES, Resource, Resources, Surface};
