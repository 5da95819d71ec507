//! Memory that passed-through devices reach by DMA, besides guest RAM and the BARs of each other.

mod shared_blobs;
mod space;

pub use shared_blobs::{SharedBlob, SharedBlobDmaMap};
pub(crate) use space::MemoryKind;
#[cfg(test)]
pub(crate) use space::test_util;
pub use space::{DmaMemory, DmaSpace};
