//! A frame and a cursor image, as the API describes them.

use std::os::fd::OwnedFd;

/// Bytes of a pixel: every format of a virtio-gpu has four.
pub const PIXEL: u32 = 4;

/// A frame in a dma-buf or in shared memory.
#[derive(Debug)]
pub struct Frame {
    /// The memory.
    pub fd: OwnedFd,
    /// Pixels in a line.
    pub width: u32,
    /// Lines.
    pub height: u32,
    /// Bytes from one line to the next.
    pub stride: u32,
    /// Bytes in front of the first line.
    pub offset: u32,
    /// DRM format code.
    pub fourcc: u32,
    /// DRM format modifier.
    pub modifier: u64,
    /// Whether the CPU can read it: it is not in memory of a passed-through device.
    pub mappable: bool,
}

impl Frame {
    /// The offset behind its last byte. `None` if that does not fit in 64 bits.
    pub fn end(&self) -> Option<u64> {
        let lines = u64::from(self.height.checked_sub(1)?) * u64::from(self.stride);
        let last = u64::from(self.width) * u64::from(PIXEL);
        lines.checked_add(last)?.checked_add(u64::from(self.offset))
    }
}

/// A cursor image: ARGB8888, lines without gaps.
#[derive(Clone, Debug)]
pub struct CursorImage {
    /// Pixels in a line.
    pub width: u32,
    /// Lines.
    pub height: u32,
    /// The hot spot, in pixels from the left.
    pub hot_x: u32,
    /// The hot spot, in pixels from the top.
    pub hot_y: u32,
    /// Four bytes a pixel.
    pub pixels: Vec<u8>,
}
