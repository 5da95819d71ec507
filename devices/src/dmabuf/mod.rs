//! Memory as dma-bufs: how a frame leaves without a copy.
//!
//! The road is one for every blob: a driver's entries → [`AddressSpace`](crate::memory::AddressSpace) →
//! [`ScatterList`], the files and offsets behind them → [`Exporter`] → [`Dmabuf`]. What kind of memory a piece
//! is says which exporter takes it; nothing is found out by trying. Pages of a memfd go through
//! [`Udmabuf`], ranges of one BAR of a passed-through device through that device ([`vfio_export`]).

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
