//! Resources whose content is the renderer's.

use std::{fs::File, sync::Arc};

use crate::{
    dmabuf::Piece,
    memory::BackingKind,
    virtio::gpu::{
        budget::Charge,
        commands::CommandError,
        format::Format,
        output::Mode,
        resources::{RESOURCE_COST, ROW_ALIGNMENT, Resources, Surface, host_memory},
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
    /// RESOURCE_CREATE_BLOB of HOST3D, of so many bytes.
    Blob(u64),
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
    /// Its pixels, as of the last flush, if it was ever on an output.
    pub shown: Option<Shown>,
    _charge: Charge,
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

impl Resources {
    /// Enters a resource that the renderer has made.
    pub fn create_host(&mut self, id: u32, kind: HostKind) -> Result<(), CommandError> {
        self.check_new(id)?;
        let resource = HostResource {
            kind,
            mapped: None,
            backed: false,
            shown: None,
            _charge: self.charge(RESOURCE_COST)?,
        };
        self.insert(id, super::super::resources::Kind::Host(resource));
        Ok(())
    }

    /// The resource of this id, if it is the renderer's.
    pub fn host_mut(&mut self, id: u32) -> Result<&mut HostResource, CommandError> {
        match &mut self.get_mut(id)?.kind {
            super::super::resources::Kind::Host(resource) => Ok(resource),
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
