//! Resources of the renderer, which holds their content.

use std::{fs::File, sync::Arc};

use super::surface::Surface;
use crate::{memory::Charge, virtio::gpu::geometry::Layout};

/// Kind of a resource of the renderer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostKind {
    /// RESOURCE_CREATE_3D.
    Texture {
        /// Pixels in a row.
        width: u32,
        /// Rows.
        height: u32,
        /// Number of its format. The renderer knows more formats than outputs do.
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

/// A resource of the renderer.
#[derive(Debug)]
pub struct HostResource {
    /// What it is.
    pub kind: HostKind,
    /// Where the guest sees it, in the host-visible region.
    pub mapped: Option<u64>,
    /// Whether it has guest memory.
    pub backed: bool,
    /// Pixels of a texture, if an output showed it recently.
    pub shown: Option<Shown>,
    /// Whether the renderer was asked for the memory of a texture, and has none to export.
    pub no_export: bool,
    /// Memory of a blob, if an output showed it recently.
    pub pixels: Option<Arc<Surface>>,
    pub(super) _charge: Charge,
}

/// Memory of a texture that outputs show: its own, or a copy as of the last flush.
#[derive(Debug)]
pub struct Shown {
    /// How they lie there.
    pub layout: Layout,
    /// The memory.
    pub surface: Arc<Surface>,
    /// Where the renderer writes what is flushed.
    pub copy: CopyTo,
}

/// Where a texture is read back to when it is flushed.
#[derive(Clone, Debug)]
pub enum CopyTo {
    /// The memory that outputs show.
    Shown(Arc<File>),
    /// A scratch page. Reading one pixel makes the renderer finish; outputs show the memory of the texture itself.
    Nowhere(Arc<File>),
}

impl HostResource {
    /// The memory with its pixels, if an output shows it.
    pub fn surface(&self) -> Option<&Arc<Surface>> {
        let texture = self.shown.as_ref().map(|shown| &shown.surface);
        texture.or(self.pixels.as_ref())
    }
}
