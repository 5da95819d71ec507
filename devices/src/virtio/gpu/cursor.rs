//! Cursors: one for each output, drawn by the viewer of the output.

use std::sync::Arc;

use super::{
    error::CommandError,
    format::Format,
    resource::{Resource, ResourceKind},
};

/// Width and height of every cursor (Virtio 1.4, 5.7.6.10).
pub const SIZE: u32 = 64;

/// An image of a cursor, as it was when the driver set it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CursorImage {
    /// Which of its pixels points, from the left.
    pub hot_x: u32,
    /// Which of its pixels points, from the top.
    pub hot_y: u32,
    /// [`SIZE`] rows of as many pixels, each red, green, blue, alpha; colours are multiplied by alpha.
    pub rgba: Vec<u8>,
}

impl CursorImage {
    /// Copies a resource's pixels. A blob has no size or format: it is read as Linux draws cursors.
    pub(super) fn read(
        resource: &Resource,
        id: u32,
        hot_x: u32,
        hot_y: u32,
    ) -> Result<Self, CommandError> {
        let row = SIZE * Format::BYTES;
        let (format, stride) = match &resource.kind {
            ResourceKind::Image(image) if (image.width, image.height) == (SIZE, SIZE) => {
                (image.format, image.stride)
            }
            ResourceKind::Blob(blob) if blob.size >= u64::from(row * SIZE) => (Format::CURSOR, row),
            _ => return Err(CommandError::Parameter("size of a cursor")),
        };
        let surface = resource
            .surface()
            .ok_or(CommandError::Backing("is not there"))?;
        let mut rgba = vec![0; (row * SIZE) as usize];
        let reader = surface.buffer.reader();
        for (y, row) in (0u64..).zip(rgba.chunks_exact_mut(row as usize)) {
            reader.read(y * u64::from(stride), row)?;
        }
        for pixel in rgba.as_chunks_mut().0 {
            *pixel = format.to_rgba(*pixel);
        }
        tracing::trace!(id, "new cursor");
        Ok(Self { hot_x, hot_y, rgba })
    }
}

/// An output's cursor.
#[derive(Clone, Debug, Default)]
pub struct Cursor {
    /// Where the upper left corner of its image is, from the left edge of the output.
    pub x: i32,
    /// The same from the upper edge.
    pub y: i32,
    /// What it looks like; nothing while it is hidden.
    pub image: Option<Arc<CursorImage>>,
}
