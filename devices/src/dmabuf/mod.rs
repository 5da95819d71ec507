//! Memory as dma-bufs: how a frame leaves the guest without a copy.
//!
//! All blobs take one path: entries of the driver → [`AddressSpace`](crate::memory::AddressSpace) →
//! [`ScatterList`], the files and offsets behind them → [`Exporter`] → [`Dmabuf`]. The kind of memory decides which
//! exporter is used; nothing is found out by trying. Pages of a memfd go through [`Udmabuf`]. Ranges of one BAR of
//! a passed-through device go through that device ([`vfio_export`]).

mod buffer;
mod device_view;
mod export;
mod scatter;
mod udmabuf;
pub mod vfio_export;

pub use crate::sys::udmabuf::UdmabufItem;
pub use buffer::{Buffer, BufferError, Reader};
pub use export::{Dmabuf, ExportError, Exporter, Piece};
pub use scatter::{MemoryEntry, ScatterError, ScatterList};
pub use udmabuf::{Limits, Udmabuf, UdmabufError};
