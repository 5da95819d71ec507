//! What a guest's programs do with its screen, through the stock virtio-gpu driver.

mod pages;
mod painter;
mod virtgpu;

pub use painter::{Painter, paint};
