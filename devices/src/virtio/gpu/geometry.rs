//! Rectangles of pixels, and how rows of pixels lie in memory.

use super::{error::CommandError, format::Format, output::Mode, protocol::Rect};

/// A rectangle of pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Left edge.
    pub x: u32,
    /// Upper edge.
    pub y: u32,
    /// Pixels in a row, never zero.
    pub width: u32,
    /// Rows, never zero.
    pub height: u32,
}

impl Area {
    /// The rectangle on the wire; `None` if it is empty or passes the end of the numbers.
    pub fn from_wire(rect: &Rect) -> Option<Self> {
        let area = Self {
            x: rect.x.get(),
            y: rect.y.get(),
            width: rect.width.get(),
            height: rect.height.get(),
        };
        area.x.checked_add(area.width)?;
        area.y.checked_add(area.height)?;
        (area.width > 0 && area.height > 0).then_some(area)
    }

    fn right(&self) -> u32 {
        self.x + self.width
    }

    fn bottom(&self) -> u32 {
        self.y + self.height
    }

    /// Whether an image of this size holds it.
    pub fn is_within(&self, width: u32, height: u32) -> bool {
        self.right() <= width && self.bottom() <= height
    }

    /// The part of this that is in `other`.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        let (x, y) = (self.x.max(other.x), self.y.max(other.y));
        let (right, bottom) = (
            self.right().min(other.right()),
            self.bottom().min(other.bottom()),
        );
        (x < right && y < bottom).then(|| Self {
            x,
            y,
            width: right - x,
            height: bottom - y,
        })
    }

    /// The smallest rectangle with both.
    pub fn union(&self, other: &Self) -> Self {
        let (x, y) = (self.x.min(other.x), self.y.min(other.y));
        Self {
            x,
            y,
            width: self.right().max(other.right()) - x,
            height: self.bottom().max(other.bottom()) - y,
        }
    }

    /// The same, seen from `origin`, which must not be to its right or below.
    pub fn relative_to(&self, origin: &Self) -> Self {
        Self {
            x: self.x - origin.x,
            y: self.y - origin.y,
            ..*self
        }
    }
}

/// How pixels lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Their format.
    pub format: Format,
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Bytes from one row to the next.
    pub stride: u32,
    /// Where the first row starts, in bytes.
    pub offset: u32,
}

impl Layout {
    /// Checks that the image lies within `size` bytes.
    pub fn check(&self, size: u64) -> Result<(), CommandError> {
        let fits = 1..=Mode::MAX;
        if !fits.contains(&self.width) || !fits.contains(&self.height) {
            return Err(CommandError::Parameter("size of a framebuffer"));
        }
        let row = u64::from(self.width) * u64::from(Format::BYTES);
        if u64::from(self.stride) < row {
            return Err(CommandError::Parameter("stride"));
        }
        // Cannot overflow: each factor fits 32 bits.
        let rows = u64::from(self.height - 1) * u64::from(self.stride);
        let end = rows.checked_add(row + u64::from(self.offset));
        if end.is_none_or(|end| end > size) {
            return Err(CommandError::Parameter("framebuffer beyond its resource"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rectangles_that_pass_the_end_of_numbers_are_none() {
        let wire = |x: u32, width: u32| Rect {
            x: x.into(),
            y: 0.into(),
            width: width.into(),
            height: 1.into(),
        };
        assert!(Area::from_wire(&wire(u32::MAX, 1)).is_none());
        assert!(Area::from_wire(&wire(u32::MAX - 1, 1)).is_some());
        assert!(Area::from_wire(&wire(0, 0)).is_none());
    }

    #[test]
    fn layouts_are_checked_in_64_bits() {
        let layout = Layout {
            format: Format::CURSOR,
            width: 16384,
            height: 16384,
            stride: u32::MAX,
            offset: u32::MAX,
        };
        let need = 16383 * u64::from(u32::MAX) + 65536 + u64::from(u32::MAX);
        assert!(layout.check(need).is_ok());
        assert!(layout.check(need - 1).is_err());
        assert!(
            Layout {
                stride: 65535,
                ..layout
            }
            .check(u64::MAX)
            .is_err()
        );
        assert!(Layout { width: 0, ..layout }.check(u64::MAX).is_err());
    }
}
