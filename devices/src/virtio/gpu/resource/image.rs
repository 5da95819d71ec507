//! 2D resources, whose pixels lie in memory of the device.

use std::sync::Arc;

use vm_memory::MmapRegion;

use super::surface::{RESOURCE_COST, ROW_ALIGNMENT, Surface};
use crate::{
    dmabuf::{Piece, ScatterList},
    memory::{BackingKind, Charge},
    sys::memfd,
    virtio::gpu::{error::CommandError, format::Format, output::Mode},
};
use fanlight_arch::layout::PAGE_SIZE;

/// A 2D resource.
#[derive(Debug)]
pub struct Image {
    /// Format of its pixels.
    pub format: Format,
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Bytes from one row to the next.
    pub stride: u32,
    /// The pixels.
    pub surface: Arc<Surface>,
    /// The same, mapped.
    pub pixels: MmapRegion,
    /// Where transfers read from.
    pub backing: Option<ImageBacking>,
}

/// Guest memory behind a 2D resource.
#[derive(Debug)]
pub struct ImageBacking {
    /// The memory.
    pub memory: ScatterList,
    pub(super) _charge: Charge,
}

impl Image {
    /// RESOURCE_CREATE_2D. `charge` charges bytes to the guest.
    pub fn new(
        format: Format,
        width: u32,
        height: u32,
        charge: impl FnOnce(u64) -> Result<Charge, CommandError>,
    ) -> Result<Self, CommandError> {
        let fits = 1..=Mode::MAX;
        if !fits.contains(&width) || !fits.contains(&height) {
            return Err(CommandError::Parameter("size of a 2D resource"));
        }
        let stride = (width * Format::BYTES).next_multiple_of(ROW_ALIGNMENT);
        let size = (u64::from(stride) * u64::from(height)).next_multiple_of(PAGE_SIZE);
        let charge = charge(size + RESOURCE_COST)?;
        let (file, pixels) = memfd::mapped("fanlight-gpu", size).map_err(CommandError::Host)?;
        let piece = Piece {
            kind: BackingKind::Ram,
            file,
            offset: 0,
            len: size,
        };
        Ok(Self {
            format,
            width,
            height,
            stride,
            surface: Surface::new(vec![piece], Arc::new(charge)),
            pixels,
            backing: None,
        })
    }
}
