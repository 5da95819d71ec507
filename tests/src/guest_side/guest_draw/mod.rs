//! What a guest's programs do with its screen, through the stock virtio-gpu driver.

mod draw;
mod pages;
mod virtgpu;

pub use draw::draw;
