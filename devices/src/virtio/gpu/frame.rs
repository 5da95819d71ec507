//! A frame: what an output shows, and its dma-buf.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    format::{DRM_FORMAT_MOD_LINEAR, Format},
    geometry::{Area, Layout},
    pixels::Pixels,
    resource::Surface,
    scanout::Location,
};
use crate::dmabuf::{BufferError, ExportError, Exporter, Reader};

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
    /// Counts the bytes that are read from frames.
    pub copied: Arc<AtomicU64>,
}

/// What the descriptor of a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameMemory {
    /// A dma-buf with the pixels themselves.
    DmaBuf,
    /// A memory file with a copy of them.
    Shared,
}

/// A frame as a descriptor, for a viewer.
#[derive(Debug)]
pub struct ExportedFrame {
    /// Its memory.
    pub fd: OwnedFd,
    /// What kind of memory that is.
    pub memory: FrameMemory,
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

/// Why a frame cannot be exported, read or copied.
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
        .limit >> 20
    )]
    TooManyCopies {
        /// How many bytes there may be.
        limit: u64,
    },
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

    /// A dma-buf of the frame. All callers share it, until the driver detaches the memory.
    pub fn export(&self, exporter: &Exporter) -> Result<ExportedFrame, FrameError> {
        let dmabuf = self.surface.buffer.dmabuf(exporter)?;
        Ok(ExportedFrame {
            fd: dmabuf.try_clone().map_err(FrameError::Duplicate)?,
            memory: FrameMemory::DmaBuf,
            width: self.area.width,
            height: self.area.height,
            stride: self.layout.stride,
            offset: self.offset(),
            fourcc: self.layout.format.fourcc(),
            modifier: DRM_FORMAT_MOD_LINEAR,
            location: self.location,
        })
    }

    /// A reader for several rows.
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
    /// Reads pixels of one row, from `x` on. Both count from the corner of the frame.
    pub(super) fn read(&self, x: u32, y: u32, to: &mut [u8]) -> Result<(), FrameError> {
        self.frame
            .copied
            .fetch_add(to.len() as u64, Ordering::Relaxed);
        let row = u64::from(y) * u64::from(self.frame.layout.stride);
        let at = self.frame.offset() + row + u64::from(x) * u64::from(Format::BYTES);
        Ok(self.reader.read(at, to)?)
    }
}
