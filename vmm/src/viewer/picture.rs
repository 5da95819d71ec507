//! What a display shows, as the API describes it.

use std::os::fd::OwnedFd;

/// Bytes of a pixel: every format of a virtio-gpu has four.
pub const PIXEL: u32 = 4;

/// A picture in a dma-buf.
#[derive(Debug)]
pub struct Picture {
    /// The dma-buf.
    pub fd: OwnedFd,
    /// Pixels in a line.
    pub width: u32,
    /// Lines.
    pub height: u32,
    /// Bytes from a line to the next.
    pub stride: u32,
    /// Bytes in front of the first line.
    pub offset: u32,
    /// DRM's code of the format.
    pub fourcc: u32,
    /// DRM's code of the layout.
    pub modifier: u64,
    /// Whether the processor can read it: it does not lie in memory of a passed-through device.
    pub mappable: bool,
}

/// A cursor: ARGB8888, its lines without gaps.
#[derive(Clone, Debug)]
pub struct CursorPicture {
    /// Pixels in a line.
    pub width: u32,
    /// Lines.
    pub height: u32,
    /// The point that points, from the left.
    pub hot_x: u32,
    /// The same from the top.
    pub hot_y: u32,
    /// Four bytes a pixel.
    pub pixels: Vec<u8>,
}

impl Picture {
    /// Where its last byte ends, if that can be.
    pub fn end(&self) -> Option<u64> {
        let lines = u64::from(self.height.checked_sub(1)?) * u64::from(self.stride);
        let last = u64::from(self.width) * u64::from(PIXEL);
        lines.checked_add(last)?.checked_add(u64::from(self.offset))
    }
}
