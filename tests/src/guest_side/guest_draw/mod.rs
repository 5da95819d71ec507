//! Guest programs that use the screen through the stock virtio-gpu driver.

mod draw;
mod pages;
mod virtgpu;

pub use draw::draw;
