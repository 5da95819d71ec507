//! Resources whose content is the renderer's.

use std::{fs::File, sync::Arc};

use super::surface::Surface;
use crate::{memory::Charge, virtio::gpu::geometry::Layout};

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
    pub(super) _charge: Charge,
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
