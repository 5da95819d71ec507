//! Block device (Virtio 1.3, 5.2): requests of the driver on a [`DiskImage`], a thread for each queue.

mod device;
mod disk;
mod request;

pub use device::Block;
pub use disk::{DiskError, DiskFormat, DiskImage};
