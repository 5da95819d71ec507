//! What a guest's programs do with its screen, through the stock virtio-gpu driver.

mod drm;
mod pages;
mod painter;
mod virtgpu;

pub use drm::{Card, Shown};
pub use painter::{Painter, paint};
