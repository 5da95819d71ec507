//! Resources whose content is the renderer's.

use std::{
    fs::File,
    io::{Seek, SeekFrom},
    sync::Arc,
};

use crate::{
    dmabuf::Piece,
    memory::{BackingKind, FileKind},
    virtio::gpu::{
        budget::Charge,
        commands::CommandError,
        format::Format,
        output::Mode,
        resources::{Kind, RESOURCE_COST, ROW_ALIGNMENT, Resources, Surface, host_memory},
        scanout::Layout,
    },
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
    /// Its memory and how that is cached, from when it was made until it is shown.
    pub memory: Option<BlobFile>,
    /// Where the guest sees it, in the host-visible region.
    pub mapped: Option<u64>,
    /// Whether it has guest memory.
    pub backed: bool,
    /// A texture's pixels, as of the last flush, if it was ever on an output.
    pub shown: Option<Shown>,
    /// A blob's own memory, if it was on an output lately.
    pub pixels: Option<Arc<Surface>>,
    _charge: Charge,
}

/// A blob's memory.
#[derive(Debug)]
pub struct BlobFile {
    /// The memory.
    pub file: File,
    /// How the guest is to cache it (`VIRTIO_GPU_MAP_CACHE_*`).
    pub cache: u32,
}

/// A copy of a texture's pixels.
#[derive(Debug)]
pub struct Shown {
    /// How they lie there.
    pub layout: Layout,
    /// The memory.
    pub surface: Arc<Surface>,
    /// The same, for the renderer to write.
    pub file: Arc<File>,
}

impl HostResource {
    /// The memory with its pixels, if an output shows it.
    pub fn surface(&self) -> Option<&Arc<Surface>> {
        let texture = self.shown.as_ref().map(|shown| &shown.surface);
        texture.or(self.pixels.as_ref())
    }
}

/// Blobs of which outputs can show the memory, each of which is a descriptor of this process's. Programs that draw
/// take turns with two or three.
const MAX_PIXELS: usize = 64;

impl Resources {
    /// Has outputs show a blob's memory, which is a dma-buf or a memory file. Blobs that are on no output make room.
    pub fn show_blob(
        &mut self,
        id: u32,
        file: File,
        is_on_output: impl Fn(u32) -> bool,
    ) -> Result<(), CommandError> {
        let HostKind::Blob { len, .. } = self.host_mut(id)?.kind else {
            return Err(CommandError::Resource(id));
        };
        let is_dmabuf = FileKind::of(&file).is_ok_and(|kind| kind == FileKind::DmaBuf);
        let end = (&file).seek(SeekFrom::End(0)).map_err(CommandError::Host)?;
        if end < len {
            return Err(CommandError::Renderer);
        }
        let mut with_pixels = 0;
        for (other, resource) in self.iter_mut() {
            if let Kind::Host(host) = &mut resource.kind
                && host.pixels.is_some()
            {
                with_pixels += 1;
                if with_pixels >= MAX_PIXELS && !is_on_output(other) {
                    host.pixels = None;
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
        let surface = Surface::new(vec![piece], Arc::new(charge));
        self.host_mut(id)?.pixels = Some(surface);
        Ok(())
    }

    /// Enters a resource that the renderer has made.
    pub fn create_host(
        &mut self,
        id: u32,
        kind: HostKind,
        memory: Option<BlobFile>,
    ) -> Result<(), CommandError> {
        self.check_new(id)?;
        let resource = HostResource {
            kind,
            memory,
            mapped: None,
            backed: false,
            shown: None,
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

    /// Gives a texture memory for what outputs show of it; how it lies there.
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
            file,
        });
        Ok(layout)
    }
}
