//! Copies of pixels, for those who read them.

use super::format::Format;

/// A copy of an image, rows one behind the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pixels {
    /// Format of the bytes.
    pub format: Format,
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// The pixels.
    pub bytes: Vec<u8>,
}

impl Pixels {
    /// All pixels in order, as red, green, blue, alpha.
    pub fn iter_rgba(&self) -> impl Iterator<Item = [u8; 4]> + '_ {
        let pixels = self.bytes.as_chunks().0.iter();
        pixels.map(|&pixel| self.format.to_rgba(pixel))
    }

    /// The pixel at a place within the image, as red, green, blue, alpha.
    pub fn rgba(&self, x: u32, y: u32) -> Option<[u8; 4]> {
        let pixels = self.bytes.as_chunks().0;
        let index = y as usize * self.width as usize + x as usize;
        let pixel = (x < self.width).then(|| pixels.get(index))??;
        Some(self.format.to_rgba(*pixel))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_are_found_by_place() {
        let pixels = Pixels {
            format: Format::CURSOR,
            width: 2,
            height: 1,
            bytes: vec![1, 2, 3, 4, 5, 6, 7, 8],
        };
        assert_eq!(pixels.rgba(1, 0), Some([7, 6, 5, 8]));
        assert_eq!(pixels.rgba(2, 0), None);
        let all: Vec<_> = pixels.iter_rgba().collect();
        assert_eq!(all, [[3, 2, 1, 4], [7, 6, 5, 8]]);
    }
}
