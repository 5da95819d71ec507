//! What outputs show: a rectangle of a resource, and how others get at its pixels.

use std::{io, os::fd::OwnedFd, sync::Arc};

use super::{
    commands::CommandError,
    format::{DRM_FORMAT_MOD_LINEAR, Format},
    output::Mode,
    protocol,
    resource::Surface,
};
use crate::dmabuf::{BufferError, ExportError, Exporter, Reader};

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
    pub fn from_wire(rect: &protocol::Rect) -> Option<Self> {
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

    /// What of this lies in `other`.
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
    fn relative_to(&self, origin: &Self) -> Self {
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

/// What an output was told to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scanout {
    /// Resource with the pixels.
    pub resource: u32,
    /// How they lie in it.
    pub layout: Layout,
    /// Which of them are shown.
    pub area: Area,
}

impl Scanout {
    /// What of a flushed rectangle is on the output, in the output's own coordinates.
    pub fn damage(&self, flushed: &Area) -> Option<Area> {
        let visible = flushed.intersection(&self.area)?;
        Some(visible.relative_to(&self.area))
    }
}

/// Where pixels live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// In the guest's RAM: what the guest writes is there at once.
    GuestRam,
    /// In memory of a passed-through device's, where it may draw too.
    Device,
    /// In memory of Fanlight's, as of the guest's last transfer, or of its renderer's, where it draws.
    Host,
}

/// What an output shows: a view of live memory, not a copy.
#[derive(Clone, Debug)]
pub struct Frame {
    /// How the pixels lie in the buffer.
    pub layout: Layout,
    /// Which of them are shown.
    pub area: Area,
    /// Where they live.
    pub location: Location,
    /// The memory.
    pub surface: Arc<Surface>,
}

/// What a descriptor of an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageMemory {
    /// A dma-buf with the pixels themselves.
    DmaBuf,
    /// A memory file with a copy of them.
    Shared,
}

/// An image that others can look at.
#[derive(Debug)]
pub struct ExportedImage {
    /// Its memory.
    pub fd: OwnedFd,
    /// What kind of memory that is.
    pub memory: ImageMemory,
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Bytes from one row to the next.
    pub stride: u32,
    /// Where the first row starts, in bytes.
    pub offset: u64,
    /// Format, by DRM's name.
    pub fourcc: u32,
    /// Layout, by DRM's name: always linear.
    pub modifier: u64,
    /// Where the pixels live.
    pub location: Location,
}

/// Why a frame does not come out.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// There is no dma-buf of it.
    #[error("no dma-buf of it can be made")]
    Export(#[from] ExportError),
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] BufferError),
    /// There are as many copies as there may be.
    #[error(
        "there are {} MiB of copied frames already: close another viewer, or have dma-bufs made",
        super::frame_copy::MAX_COPIES >> 20
    )]
    TooManyCopies,
    /// There is no memory for a copy.
    #[error("cannot copy it to shared memory")]
    Copy(#[source] io::Error),
    /// A descriptor cannot be duplicated.
    #[error("cannot duplicate a descriptor")]
    Duplicate(#[source] io::Error),
}

impl Frame {
    /// Where the first pixel shown starts in the buffer, in bytes.
    fn offset(&self) -> u64 {
        u64::from(self.layout.offset)
            + u64::from(self.area.y) * u64::from(self.layout.stride)
            + u64::from(self.area.x) * u64::from(Format::BYTES)
    }

    /// A dma-buf with what is shown; the same one for everybody, until the driver takes the memory away.
    pub fn export(&self, exporter: &Exporter) -> Result<ExportedImage, FrameError> {
        let dmabuf = self.surface.buffer.dmabuf(exporter)?;
        Ok(ExportedImage {
            fd: dmabuf.try_clone().map_err(FrameError::Duplicate)?,
            memory: ImageMemory::DmaBuf,
            width: self.area.width,
            height: self.area.height,
            stride: self.layout.stride,
            offset: self.offset(),
            fourcc: self.layout.format.fourcc(),
            modifier: DRM_FORMAT_MOD_LINEAR,
            location: self.location,
        })
    }

    /// What reads several rows.
    pub(super) fn rows(&self) -> Rows<'_> {
        Rows {
            frame: self,
            reader: self.surface.buffer.reader(),
        }
    }

    /// A copy of what is shown.
    pub fn read(&self) -> Result<Pixels, FrameError> {
        let Area { width, height, .. } = self.area;
        let row = width as usize * Format::BYTES as usize;
        let mut bytes = vec![0; row * height as usize];
        let rows = self.rows();
        for (y, row) in (0..).zip(bytes.chunks_exact_mut(row)) {
            rows.read(0, y, row)?;
        }
        Ok(Pixels {
            format: self.layout.format,
            width,
            height,
            bytes,
        })
    }
}

/// Reads what a frame shows.
#[derive(Debug)]
pub(super) struct Rows<'a> {
    frame: &'a Frame,
    reader: Reader<'a>,
}

impl Rows<'_> {
    /// Reads pixels of one row, from `x` on. Both count from the corner of what is shown.
    pub(super) fn read(&self, x: u32, y: u32, to: &mut [u8]) -> Result<(), FrameError> {
        let row = u64::from(y) * u64::from(self.frame.layout.stride);
        let at = self.frame.offset() + row + u64::from(x) * u64::from(Format::BYTES);
        Ok(self.reader.read(at, to)?)
    }
}

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
    /// The pixel at a place within the image, as red, green, blue, alpha.
    pub fn rgba(&self, x: u32, y: u32) -> Option<[u8; 4]> {
        let pixels = self.bytes.as_chunks().0;
        let index = y as usize * self.width as usize + x as usize;
        let pixel = (x < self.width).then(|| pixels.get(index))??;
        Some(self.format.to_rgba(*pixel))
    }

    /// Writes a PNG. Screens are opaque: transparency is left out.
    pub fn write_png(&self, to: impl io::Write) -> Result<(), png::EncodingError> {
        let mut encoder = png::Encoder::new(to, self.width, self.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_compression(png::Compression::Fast);
        let pixels = self.bytes.as_chunks().0;
        let rgb: Vec<u8> = pixels
            .iter()
            .flat_map(|&pixel| {
                let [red, green, blue, _] = self.format.to_rgba(pixel);
                [red, green, blue]
            })
            .collect();
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&rgb)?;
        writer.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(x: u32, y: u32, width: u32, height: u32) -> Area {
        Area {
            x,
            y,
            width,
            height,
        }
    }

    #[test]
    fn rectangles_that_pass_the_end_of_numbers_are_none() {
        let wire = |x: u32, width: u32| protocol::Rect {
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
    fn damage_is_what_the_output_shows_of_it() {
        let scanout = Scanout {
            resource: 1,
            layout: Layout {
                format: Format::CURSOR,
                width: 200,
                height: 100,
                stride: 800,
                offset: 0,
            },
            area: area(100, 10, 100, 50),
        };
        assert_eq!(scanout.damage(&area(0, 0, 100, 100)), None);
        assert_eq!(
            scanout.damage(&area(90, 0, 20, 100)),
            Some(area(0, 0, 10, 50))
        );
        assert_eq!(area(0, 0, 1, 1).union(&area(5, 6, 2, 2)), area(0, 0, 7, 8));
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

    #[test]
    fn a_png_reads_back() {
        let pixels = Pixels {
            format: Format::CURSOR,
            width: 2,
            height: 1,
            bytes: vec![1, 2, 3, 4, 5, 6, 7, 8],
        };
        let mut file = Vec::new();
        pixels.write_png(&mut file).unwrap();
        let mut reader = png::Decoder::new(io::Cursor::new(file))
            .read_info()
            .unwrap();
        let mut back = vec![0; 6];
        reader.next_frame(&mut back).unwrap();
        assert_eq!(back, [3, 2, 1, 7, 6, 5]);
        assert_eq!(pixels.rgba(1, 0), Some([7, 6, 5, 8]));
        assert_eq!(pixels.rgba(2, 0), None);
    }
}
