//! TRANSFER_TO_HOST_2D: the one copy that a 2D resource costs.

use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileMemory};

use super::{error::CommandError, format::Format, geometry::Area, resource::Image};
use crate::{GuestMemory, memory::Segment};

/// Copies `area` of the image from its backing. It starts at `offset` there, with rows as long as those of the
/// image. Returns the bytes copied.
pub fn transfer(
    mem: &GuestMemory,
    image: &Image,
    area: Area,
    offset: u64,
) -> Result<u64, CommandError> {
    if !area.is_within(image.width, image.height) {
        return Err(CommandError::Parameter("rectangle"));
    }
    let Some(backing) = &image.backing else {
        return Err(CommandError::Backing("is not there"));
    };
    let bytes = |pixels: u32| u64::from(pixels) * u64::from(Format::BYTES);
    let (row, from_stride) = (bytes(area.width), bytes(image.width));
    let to_stride = u64::from(image.stride);
    // Cannot overflow: sizes of images are bounded.
    let len = u64::from(area.height - 1) * from_stride + row;
    if offset
        .checked_add(len)
        .is_none_or(|end| end > backing.memory.len())
    {
        return Err(CommandError::Parameter("offset"));
    }
    let mut source = Source {
        mem,
        segments: backing.memory.segments(),
        start: 0,
    };
    let to = u64::from(area.y) * to_stride + bytes(area.x);
    if row == from_stride && from_stride == to_stride {
        source.copy(image, offset, to, len)?;
        return Ok(len);
    }
    for y in 0..u64::from(area.height) {
        source.copy(image, offset + y * from_stride, to + y * to_stride, row)?;
    }
    Ok(row * u64::from(area.height))
}

/// A list of segments, read from front to back.
struct Source<'a> {
    mem: &'a GuestMemory,
    /// What is left.
    segments: &'a [Segment],
    /// Where in the list the first of these begins.
    start: u64,
}

impl Source<'_> {
    /// Copies `len` bytes from `from` in the list to `to` in the image. Never goes back.
    fn copy(
        &mut self,
        image: &Image,
        mut from: u64,
        mut to: u64,
        mut len: u64,
    ) -> Result<(), CommandError> {
        while len > 0
            && let Some(segment) = self.segments.first()
        {
            let within = from - self.start;
            if within >= segment.len {
                self.start += segment.len;
                self.segments = &self.segments[1..];
                continue;
            }
            let part = len.min(segment.len - within);
            let gone = |_| CommandError::Parameter("memory behind a resource");
            let source = self
                .mem
                .get_slice(GuestAddress(segment.gpa + within), part as usize)
                .map_err(gone)?;
            let target = image
                .pixels
                .get_slice(to as usize, part as usize)
                .map_err(|_| CommandError::Parameter("rectangle"))?;
            source.copy_to_volatile_slice(target);
            (from, to, len) = (from + part, to + part, len - part);
        }
        Ok(())
    }
}
