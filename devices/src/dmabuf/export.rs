//! The one way from memory to a dma-buf: which exporter takes which kind of memory.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use thiserror::Error;

use super::{
    udmabuf::{Udmabuf, UdmabufError},
    vfio_export::{self, Access, DmaBufError},
};
use crate::{
    memory::{BackingKind, Charge, Quota},
    sys::{udmabuf::UdmabufItem, vfio::BarRange},
};

/// A dma-buf that this process has open.
#[derive(Debug)]
pub struct Dmabuf {
    fd: OwnedFd,
    _open: Charge,
}

/// Dma-bufs at a time. Each is a descriptor, and a guest can show one resource after the other to a viewer.
const MAX_OPEN: u64 = 256;

impl Dmabuf {
    /// Another descriptor of the dma-buf, to be passed on.
    pub fn try_clone(&self) -> std::io::Result<OwnedFd> {
        self.fd.try_clone()
    }
}

impl AsFd for Dmabuf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A range of a file. What is exported consists of these, in order.
#[derive(Clone, Debug)]
pub struct Piece {
    /// What kind of memory it is.
    pub kind: BackingKind,
    /// The file.
    pub file: Arc<File>,
    /// Where in the file it starts, in bytes.
    pub offset: u64,
    /// Its length in bytes, never zero.
    pub len: u64,
}

/// Why memory does not become a dma-buf.
#[derive(Clone, Debug, Error)]
pub enum ExportError {
    /// No exporter takes this kind of memory.
    #[error(
        "piece {index} is in {kind}, of which no dma-buf can be made together with what is before it"
    )]
    Kind {
        /// Which piece.
        index: usize,
        /// What it is.
        kind: BackingKind,
    },
    /// Pieces start and end where pages do not.
    #[error(
        "piece {index}, {len:#x} bytes at {offset:#x}, does not start and end at pages: dma-bufs are made of whole pages"
    )]
    Unaligned {
        /// Which piece.
        index: usize,
        /// Where it starts in its file.
        offset: u64,
        /// Its length.
        len: u64,
    },
    /// The guest has as many dma-bufs as it may.
    #[error("{MAX_OPEN} dma-bufs of the guest's memory are open: it must let resources go first")]
    TooMany,
    /// udmabuf.
    #[error(transparent)]
    Udmabuf(#[from] UdmabufError),
    /// The renderer's dma-buf cannot be passed on.
    #[error("cannot duplicate the renderer's dma-buf")]
    Duplicate(#[source] Arc<std::io::Error>),
    /// A passed-through device.
    #[error("cannot export memory of a passed-through device")]
    Bar(#[source] Arc<DmaBufError>),
}

impl ExportError {
    /// A number for each cause.
    fn cause(&self) -> u32 {
        match self {
            Self::Kind { .. } => 0,
            Self::Unaligned { .. } => 1,
            Self::TooMany => 2,
            Self::Bar(_) => 3,
            Self::Udmabuf(UdmabufError::Open(_)) => 4,
            Self::Udmabuf(UdmabufError::TooManyPieces { .. }) => 5,
            Self::Udmabuf(UdmabufError::TooLarge { .. }) => 6,
            Self::Udmabuf(UdmabufError::Refused { .. }) => 7,
            Self::Duplicate(_) => 8,
        }
    }
}

/// Makes dma-bufs on this host. Opened once.
#[derive(Debug)]
pub struct Exporter {
    udmabuf: Result<Udmabuf, UdmabufError>,
    open: Arc<Quota>,
    /// Causes of failures that were logged. A guest could fill a log with them.
    told: AtomicU32,
}

impl Exporter {
    /// Opens what the host has. A host without udmabuf is no error before something is exported.
    pub fn open() -> Self {
        Self {
            udmabuf: Udmabuf::open(),
            open: Quota::new(MAX_OPEN),
            told: AtomicU32::default(),
        }
    }

    /// An exporter of a host without udmabuf: every export fails.
    pub fn none() -> Self {
        Self {
            udmabuf: Err(UdmabufError::Open(rustix::io::Errno::NOENT)),
            open: Quota::new(MAX_OPEN),
            told: AtomicU32::default(),
        }
    }

    /// Whether this cause has not been reported before.
    pub(super) fn is_news(&self, error: &ExportError) -> bool {
        let bit = 1 << error.cause();
        self.told.fetch_or(bit, Ordering::Relaxed) & bit == 0
    }

    /// Why nothing can be exported, if nothing can.
    pub fn problem(&self) -> Option<&UdmabufError> {
        self.udmabuf.as_ref().err()
    }

    /// Makes one dma-buf of `pieces`, in their order.
    pub fn export(&self, pieces: &[Piece]) -> Result<Dmabuf, ExportError> {
        let open = self.open.charge(1).ok_or(ExportError::TooMany)?;
        let fd = self.export_fd(pieces)?;
        Ok(Dmabuf { fd, _open: open })
    }

    fn export_fd(&self, pieces: &[Piece]) -> Result<OwnedFd, ExportError> {
        if let Some(first) = pieces.first()
            && let BackingKind::Bar { region, start, .. } = first.kind
        {
            return export_bar(first, region, start, pieces);
        }
        if let [only] = pieces
            && only.kind == BackingKind::Renderer
        {
            return (only.file.try_clone().map(OwnedFd::from))
                .map_err(|source| ExportError::Duplicate(Arc::new(source)));
        }
        let mut items = Vec::with_capacity(pieces.len());
        for (index, piece) in pieces.iter().enumerate() {
            if piece.kind != BackingKind::Ram {
                let kind = piece.kind;
                return Err(ExportError::Kind { index, kind });
            }
            let page = fanlight_arch::layout::PAGE_SIZE;
            if !(piece.offset | piece.len).is_multiple_of(page) {
                return Err(ExportError::Unaligned {
                    index,
                    offset: piece.offset,
                    len: piece.len,
                });
            }
            items.push(UdmabufItem::new(&piece.file, piece.offset, piece.len));
        }
        let udmabuf = self.udmabuf.as_ref().map_err(|&error| error)?;
        Ok(udmabuf.create_list(&items)?)
    }
}

/// One dma-buf of ranges of the BAR that `first` is in.
fn export_bar(
    first: &Piece,
    region: u32,
    start: u64,
    pieces: &[Piece],
) -> Result<OwnedFd, ExportError> {
    /// Not at a page, and so in no dma-buf.
    const NOWHERE: u64 = 1;
    let other_kind = |(index, piece): (usize, &Piece)| {
        let kind = piece.kind;
        (kind != first.kind).then_some(ExportError::Kind { index, kind })
    };
    let numbered = || pieces.iter().enumerate();
    let mut other_files = numbered().filter(|(_, piece)| !Arc::ptr_eq(&piece.file, &first.file));
    if let Some(error) = other_files.find_map(other_kind) {
        return Err(error);
    }
    // A piece in another region of the device lies outside of this one. The kernel refuses that, and the cause is
    // found then.
    let ranges = pieces.iter().map(|piece| BarRange {
        offset: piece.offset.checked_sub(start).unwrap_or(NOWHERE),
        len: piece.len,
    });
    // An importer that shows a frame only reads it.
    vfio_export::export_each(&*first.file, region, ranges, Access::ReadOnly).map_err(|error| {
        let other = numbered().find_map(other_kind);
        other.unwrap_or_else(|| ExportError::Bar(Arc::new(error)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_exported_alone() {
        let [one, other] = [0; 2].map(|_| Arc::new(tempfile::tempfile().unwrap()));
        let piece = |file: &Arc<File>, device, region, offset| Piece {
            kind: BackingKind::Bar {
                device,
                region,
                start: u64::from(region) << 40,
            },
            file: file.clone(),
            offset: u64::from(region) << 40 | offset,
            len: 0x1000,
        };
        let first = piece(&one, 0, 2, 0);
        for (second, is_other) in [
            (piece(&one, 0, 2, 0x3000), false),
            (piece(&one, 0, 0, 0), true),
            (piece(&one, 0, 4, 0), true),
            (piece(&other, 1, 2, 0), true),
        ] {
            let error = Exporter::none().export(&[first.clone(), second]).err();
            let named = matches!(error, Some(ExportError::Kind { index: 1, .. }));
            assert_eq!(named, is_other, "{error:?}");
        }
    }

    #[test]
    fn each_cause_of_failure_is_news_once() {
        let exporter = Exporter::none();
        assert!(exporter.is_news(&ExportError::TooMany));
        assert!(!exporter.is_news(&ExportError::TooMany));
        let too_large = UdmabufError::TooLarge {
            size: 1,
            limit_mb: 0,
        };
        assert!(exporter.is_news(&too_large.into()));
    }
}
