//! Memory of textures and blobs of the renderer that outputs show.

use std::{
    fs::File,
    io::{Seek, SeekFrom},
    sync::Arc,
};

use super::{
    host::{CopyTo, HostKind, Shown},
    surface::{RESOURCE_COST, ROW_ALIGNMENT, Surface},
    table::{ResourceKind, Resources},
};
use crate::{
    dmabuf::Piece,
    memory::BackingKind,
    sys::{file_kind::FileKind, memfd},
    virtio::gpu::{error::CommandError, format::Format, geometry::Layout, output::Mode},
};
use fanlight_arch::layout::PAGE_SIZE;

/// How a texture lies in the memory that the renderer exports.
#[derive(Clone, Copy, Debug)]
pub struct ExportedLayout {
    /// Format of its pixels.
    pub format: Format,
    /// Bytes from one row to the next.
    pub stride: u32,
    /// Where the first row starts, in bytes.
    pub offset: u32,
}

/// Blobs and textures whose memory outputs can show. Each costs a descriptor or two; programs alternate between two
/// or three.
const MAX_PIXELS: usize = 64;

impl Resources {
    /// Lets outputs show the memory of a blob, which is a dma-buf or a memory file.
    pub fn show_blob(
        &mut self,
        id: u32,
        file: File,
        on_outputs: &[u32],
    ) -> Result<(), CommandError> {
        let HostKind::Blob { len, .. } = self.host_mut(id)?.kind else {
            return Err(CommandError::Resource(id));
        };
        let end = (&file).seek(SeekFrom::End(0)).map_err(CommandError::Host)?;
        if end < len {
            return Err(CommandError::Renderer);
        }
        let surface = self.renderer_memory(file, len, on_outputs)?;
        self.host_mut(id)?.pixels = Some(surface);
        Ok(())
    }

    /// Lets outputs show the memory of a texture.
    pub fn show_texture(
        &mut self,
        id: u32,
        file: File,
        found: ExportedLayout,
        on_outputs: &[u32],
    ) -> Result<(), CommandError> {
        let HostKind::Texture {
            width,
            height,
            format,
        } = self.host_mut(id)?.kind
        else {
            return Err(CommandError::Resource(id));
        };
        let wanted = Format::from_id(format).ok_or(CommandError::Parameter("format"))?;
        let layout = Layout {
            format: if wanted.has_alpha() {
                found.format
            } else {
                found.format.opaque()
            },
            width,
            height,
            stride: found.stride,
            offset: found.offset,
        };
        let size = (&file).seek(SeekFrom::End(0)).map_err(CommandError::Host)?;
        layout.check(size)?;
        let surface = self.renderer_memory(file, size, on_outputs)?;
        let (page, _) = memfd::mapped("fanlight-gpu", PAGE_SIZE).map_err(CommandError::Host)?;
        self.host_mut(id)?.shown = Some(Shown {
            layout,
            surface,
            copy: CopyTo::Nowhere(page),
        });
        Ok(())
    }

    /// Memory of the renderer for outputs to show. Memory on no output makes room.
    fn renderer_memory(
        &mut self,
        file: File,
        len: u64,
        on_outputs: &[u32],
    ) -> Result<Arc<Surface>, CommandError> {
        let is_dmabuf = FileKind::of(&file).is_ok_and(|kind| kind == FileKind::DmaBuf);
        let mut with_memory = 0;
        for (other, resource) in self.iter_mut() {
            let ResourceKind::Host(host) = &mut resource.kind else {
                continue;
            };
            let exported = |shown: &mut Shown| matches!(shown.copy, CopyTo::Nowhere(_));
            if host.pixels.is_some() || host.shown.as_mut().is_some_and(exported) {
                with_memory += 1;
                if with_memory >= MAX_PIXELS && !on_outputs.contains(&other) {
                    host.pixels = None;
                    host.shown.take_if(exported);
                }
            }
        }
        let piece = Piece {
            kind: if is_dmabuf {
                BackingKind::Renderer
            } else {
                BackingKind::Ram
            },
            file: Arc::new(file),
            offset: 0,
            len,
        };
        let charge = self.charge(RESOURCE_COST)?;
        Ok(Surface::new(vec![piece], Arc::new(charge)))
    }

    /// Gives a texture memory to be copied to, unless outputs show its own. Returns the layout.
    pub fn show(&mut self, id: u32) -> Result<Layout, CommandError> {
        let host = self.host_mut(id)?;
        if let Some(shown) = &host.shown {
            return Ok(shown.layout);
        }
        let HostKind::Texture {
            width,
            height,
            format,
        } = host.kind
        else {
            return Err(CommandError::Resource(id));
        };
        let fits = 1..=Mode::MAX;
        if !fits.contains(&width) || !fits.contains(&height) {
            return Err(CommandError::Parameter("size of a framebuffer"));
        }
        let layout = Layout {
            format: Format::from_id(format).ok_or(CommandError::Parameter("format"))?,
            width,
            height,
            stride: (width * Format::BYTES).next_multiple_of(ROW_ALIGNMENT),
            offset: 0,
        };
        let size = (u64::from(layout.stride) * u64::from(height)).next_multiple_of(PAGE_SIZE);
        let charge = self.charge(size)?;
        let (file, _) = memfd::mapped("fanlight-gpu", size).map_err(CommandError::Host)?;
        let piece = Piece {
            kind: BackingKind::Ram,
            file: file.clone(),
            offset: 0,
            len: size,
        };
        let surface = Surface::new(vec![piece], Arc::new(charge));
        self.host_mut(id)?.shown = Some(Shown {
            layout,
            surface,
            copy: CopyTo::Shown(file),
        });
        Ok(layout)
    }
}
