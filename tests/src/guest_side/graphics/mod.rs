//! Programs for guests that draw in 3D, by Mesa and by the guest's driver itself.

pub mod blobs;
pub mod drm;
pub mod gl;
pub mod shared;
pub mod vulkan;
