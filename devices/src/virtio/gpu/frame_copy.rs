//! Frames of which no dma-buf can be made, copied into memory that others can map.

use std::{io, os::fd::OwnedFd, sync::Arc};

use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use super::{
    format::{DRM_FORMAT_MOD_LINEAR, Format},
    frame::{ExportedFrame, Frame, FrameError, FrameMemory},
    geometry::Area,
    scanout::Location,
};
use crate::{
    memory::{Charge, Quota},
    sys::memfd,
};

/// Memory for all copied frames of a display: eight of an 8K screen.
pub const MAX_COPIES: u64 = 1 << 30;

/// A copy of a frame, as of its last update. Viewers can only read it.
#[derive(Debug)]
pub struct FrameCopy {
    frame: Frame,
    file: OwnedFd,
    memory: MmapRegion,
    _charge: Charge,
}

impl FrameCopy {
    /// Copies a frame into memory charged to `quota`.
    pub(super) fn new(frame: Frame, quota: &Arc<Quota>) -> Result<Self, FrameError> {
        let size = row(&frame) as u64 * u64::from(frame.area.height);
        let charge = quota
            .charge(size)
            .ok_or(FrameError::TooManyCopies { limit: MAX_COPIES })?;
        let (file, memory) = memfd::read_only("fanlight-frame", size).map_err(FrameError::Copy)?;
        let copy = Self {
            frame,
            file,
            memory,
            _charge: charge,
        };
        copy.update(&[copy.whole()])?;
        Ok(copy)
    }

    /// Copies another frame into the same memory. `None`: its size or format differs.
    pub fn replace(&mut self, frame: &Frame) -> Option<Result<(), FrameError>> {
        let shape = |frame: &Frame| {
            let Area { width, height, .. } = frame.area;
            (width, height, frame.layout.format)
        };
        if shape(frame) != shape(&self.frame) {
            return None;
        }
        self.frame = frame.clone();
        Some(self.update(&[self.whole()]))
    }

    fn whole(&self) -> Area {
        Area {
            x: 0,
            y: 0,
            ..self.frame.area
        }
    }

    /// Copies `areas` of the frame again. They count from its corner.
    pub fn update(&self, areas: &[Area]) -> Result<(), FrameError> {
        let row_len = row(&self.frame);
        let rows = self.frame.rows();
        for area in areas {
            // The guest may have set another frame since it drew.
            let Some(area) = area.intersection(&self.whole()) else {
                continue;
            };
            let mut line = vec![0; area.width as usize * Format::BYTES as usize];
            let from_row = area.x as usize * Format::BYTES as usize;
            for y in area.y..area.y + area.height {
                rows.read(area.x, y, &mut line)?;
                self.memory
                    .as_volatile_slice()
                    .write_slice(&line, y as usize * row_len + from_row)
                    .map_err(|error| FrameError::Copy(io::Error::other(error)))?;
            }
        }
        Ok(())
    }

    /// A descriptor of the memory, for a viewer.
    pub fn image(&self) -> Result<ExportedFrame, FrameError> {
        Ok(ExportedFrame {
            fd: self.file.try_clone().map_err(FrameError::Duplicate)?,
            memory: FrameMemory::Shared,
            width: self.frame.area.width,
            height: self.frame.area.height,
            stride: row(&self.frame) as u32,
            offset: 0,
            fourcc: self.frame.layout.format.fourcc(),
            modifier: DRM_FORMAT_MOD_LINEAR,
            location: Location::Host,
        })
    }
}

/// Bytes of a line of the copy.
fn row(frame: &Frame) -> usize {
    frame.area.width as usize * Format::BYTES as usize
}
