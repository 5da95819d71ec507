//! Programs for guests that draw in 3D, through Mesa and through the guest's driver directly.

pub mod blobs;
pub mod drm;
pub mod gl;
pub mod shared;
pub mod vulkan;
