//! Memory that holds pixels, charged to the guest that uses it.

use std::sync::Arc;

use crate::{
    dmabuf::{Buffer, Piece},
    memory::Charge,
};

/// Alignment of rows: what the strictest GPUs import.
pub const ROW_ALIGNMENT: u32 = 256;

/// What a resource costs besides its pixels and entries.
pub const RESOURCE_COST: u64 = 1 << 10;
/// Memory with pixels, charged to its guest.
#[derive(Debug)]
pub struct Surface {
    /// The memory.
    pub buffer: Buffer,
    _charge: Arc<Charge>,
}

impl Surface {
    /// Pieces of memory, with their charge.
    pub fn new(pieces: Vec<Piece>, charge: Arc<Charge>) -> Arc<Self> {
        Arc::new(Self {
            buffer: Buffer::new(pieces),
            _charge: charge,
        })
    }
}
