//! Resources whose content is the renderer's.

use std::{
    fs::File,
    io::{Seek, SeekFrom},
    sync::Arc,
};

use super::{
    super::{
        budget::Charge, commands::CommandError, format::Format, output::Mode,
        render::wire::TextureLayout, scanout::Layout,
    },
    table::{Kind, RESOURCE_COST, ROW_ALIGNMENT, Resources, Surface, host_memory},
};
use crate::{
    dmabuf::Piece,
    memory::{BackingKind, FileKind},
};
use fanlight_arch::layout::PAGE_SIZE;

/// What a resource of the renderer's is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostKind {
    /// RESOURCE_CREATE_3D.
    Texture {
        /// Pixels in a row.
        width: u32,
        /// Rows.
        height: u32,
        /// Number of its format: the renderer knows more of them than outputs do.
        format: u32,
    },
    /// RESOURCE_CREATE_BLOB of HOST3D.
    Blob {
        /// Length in bytes.
        len: u64,
        /// Whether the guest may give it to another device.
        shareable: bool,
    },
}

/// A resource whose content is the renderer's.
#[derive(Debug)]
pub struct HostResource {
    /// What it is.
    pub kind: HostKind,
    /// Where the guest sees it, in the host-visible region.
    pub mapped: Option<u64>,
    /// Whether it has guest memory.
    pub backed: bool,
    /// A texture's pixels, if it was on an output lately.
    pub shown: Option<Shown>,
    /// Whether the renderer was asked for a texture's own memory, and has none.
    pub no_export: bool,
    /// A blob's own memory, if it was on an output lately.
    pub pixels: Option<Arc<Surface>>,
    _charge: Charge,
}

/// A texture's own memory, or a copy of its pixels as of the last flush.
#[derive(Debug)]
pub struct Shown {
    /// How they lie there.
    pub layout: Layout,
    /// The memory.
    pub surface: Arc<Surface>,
    /// Where the renderer is to write what is flushed.
    pub copy: CopyTo,
}

/// Where a texture's pixels are read back to when they are flushed.
#[derive(Clone, Debug)]
pub enum CopyTo {
    /// The memory that outputs show.
    Shown(Arc<File>),
    /// A page of nobody's: reading a pixel is what has the renderer finish, and outputs show the texture's own memory.
    Nowhere(Arc<File>),
}

impl HostResource {
    /// The memory with its pixels, if an output shows it.
    pub fn surface(&self) -> Option<&Arc<Surface>> {
        let texture = self.shown.as_ref().map(|shown| &shown.surface);
        texture.or(self.pixels.as_ref())
    }
}

/// Blobs and textures of which outputs can show the memory, each of which is a descriptor or two of this process's.
/// Programs that draw take turns with two or three.
const MAX_PIXELS: usize = 64;

impl Resources {
    /// Has outputs show a blob's memory, which is a dma-buf or a memory file.
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

    /// Has outputs show a texture's own memory.
    pub fn show_texture(
        &mut self,
        id: u32,
        file: File,
        found: TextureLayout,
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
        let format = Format::from_fourcc(found.fourcc).ok_or(CommandError::Renderer)?;
        let layout = Layout {
            format: if wanted.has_alpha() {
                format
            } else {
                format.opaque()
            },
            width,
            height,
            stride: found.stride,
            offset: found.offset,
        };
        let size = (&file).seek(SeekFrom::End(0)).map_err(CommandError::Host)?;
        layout.check(size)?;
        let surface = self.renderer_memory(file, size, on_outputs)?;
        let (page, _) = host_memory(PAGE_SIZE).map_err(CommandError::Host)?;
        self.host_mut(id)?.shown = Some(Shown {
            layout,
            surface,
            copy: CopyTo::Nowhere(page),
        });
        Ok(())
    }

    /// Memory of the renderer's for outputs to show. What is on no output makes room.
    fn renderer_memory(
        &mut self,
        file: File,
        len: u64,
        on_outputs: &[u32],
    ) -> Result<Arc<Surface>, CommandError> {
        let is_dmabuf = FileKind::of(&file).is_ok_and(|kind| kind == FileKind::DmaBuf);
        let mut with_memory = 0;
        for (other, resource) in self.iter_mut() {
            let Kind::Host(host) = &mut resource.kind else {
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

    /// Enters a resource that the renderer has made.
    pub fn create_host(&mut self, id: u32, kind: HostKind) -> Result<(), CommandError> {
        self.check_new(id)?;
        let resource = HostResource {
            kind,
            mapped: None,
            backed: false,
            shown: None,
            no_export: false,
            pixels: None,
            _charge: self.charge(RESOURCE_COST)?,
        };
        self.insert(id, Kind::Host(resource));
        Ok(())
    }

    /// The resource of this id, if it is the renderer's.
    pub fn host_mut(&mut self, id: u32) -> Result<&mut HostResource, CommandError> {
        match &mut self.get_mut(id)?.kind {
            Kind::Host(resource) => Ok(resource),
            _ => Err(CommandError::Resource(id)),
        }
    }

    /// Gives a texture memory for what outputs show of it, unless it shows its own; how it lies there.
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
        let (file, _) = host_memory(size).map_err(CommandError::Host)?;
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
