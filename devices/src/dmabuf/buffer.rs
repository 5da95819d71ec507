//! Memory that holds pixels: exported once and kept, or read by the processor.

use std::{io, os::unix::fs::FileExt, sync::OnceLock};

use thiserror::Error;

use super::{
    device_view::View,
    export::{Dmabuf, ExportError, Exporter, Piece},
};
use crate::{memory::BackingKind, sync::Mutex};

/// Why a buffer cannot be read.
#[derive(Debug, Error)]
pub enum BufferError {
    /// The range lies outside of it.
    #[error("{len:#x} bytes at {offset:#x} lie outside of a buffer of {size:#x}")]
    Outside {
        /// First byte.
        offset: u64,
        /// Length.
        len: u64,
        /// Bytes in the buffer.
        size: u64,
    },
    /// The host's memory cannot be read.
    #[error("cannot read memory")]
    Read(#[source] io::Error),
}

/// Pieces of files that form one run of bytes. The dma-buf is made when it is first asked for, and lives as long as
/// the buffer.
#[derive(Debug)]
pub struct Buffer {
    pieces: Vec<Piece>,
    size: u64,
    dmabuf: OnceLock<Dmabuf>,
    /// Why the export failed, if it always will.
    failed: Mutex<Option<ExportError>>,
}

impl Buffer {
    /// Takes pieces, in order.
    pub fn new(pieces: Vec<Piece>) -> Self {
        Self {
            size: pieces.iter().map(|piece| piece.len).sum(),
            pieces,
            dmabuf: OnceLock::new(),
            failed: Mutex::default(),
        }
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The pieces, in order.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The dma-buf. A failed export fails the same way ever after, unless other buffers had used up a limit.
    pub fn dmabuf(&self, exporter: &Exporter) -> Result<&Dmabuf, ExportError> {
        let mut failed = self.failed.lock();
        if let Some(dmabuf) = self.dmabuf.get() {
            return Ok(dmabuf);
        }
        if let Some(error) = &*failed {
            return Err(error.clone());
        }
        match exporter.export(&self.pieces) {
            Ok(dmabuf) => Ok(self.dmabuf.get_or_init(|| dmabuf)),
            Err(error) => {
                if exporter.is_news(&error) {
                    tracing::warn!(
                        size = self.size,
                        "pixels are copied for those who look at them: {}",
                        crate::error_line(&error)
                    );
                }
                if !matches!(error, ExportError::TooMany) {
                    *failed = Some(error.clone());
                }
                Err(error)
            }
        }
    }

    /// A reader for several reads.
    pub fn reader(&self) -> Reader<'_> {
        let by_mapping = self.pieces.first().is_some_and(|piece| {
            matches!(piece.kind, BackingKind::Bar { .. } | BackingKind::Renderer)
        });
        let view = by_mapping.then(|| View::new(&self.pieces));
        let view = view.and_then(|view| {
            view.inspect_err(
                |error| tracing::debug!(%error, "device memory is read through its descriptor"),
            )
            .ok()
        });
        Reader { buffer: self, view }
    }

    /// Reads bytes from `offset` on.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), BufferError> {
        self.check(offset, data)?;
        let (mut skip, mut rest) = (offset, data);
        for piece in &self.pieces {
            if skip >= piece.len {
                skip -= piece.len;
                continue;
            }
            let part = rest.len().min((piece.len - skip) as usize);
            let (now, later) = rest.split_at_mut(part);
            piece
                .file
                .read_exact_at(now, piece.offset + skip)
                .map_err(BufferError::Read)?;
            (skip, rest) = (0, later);
            if rest.is_empty() {
                break;
            }
        }
        Ok(())
    }

    fn check(&self, offset: u64, data: &[u8]) -> Result<(), BufferError> {
        let len = data.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(BufferError::Outside {
                offset,
                len,
                size: self.size,
            });
        }
        Ok(())
    }
}

/// Reads a buffer. Memory of a device is read through a mapping, which is much faster than its descriptor.
#[derive(Debug)]
pub struct Reader<'a> {
    buffer: &'a Buffer,
    view: Option<View>,
}

impl Reader<'_> {
    /// Reads bytes from `offset` on.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), BufferError> {
        match &self.view {
            None => self.buffer.read(offset, data),
            Some(view) => {
                self.buffer.check(offset, data)?;
                view.read(offset, data).map_err(BufferError::Read)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, sync::Arc};

    use super::*;
    use crate::memory::BackingKind;

    fn buffer() -> Buffer {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let file = Arc::new(file);
        let piece = |offset, len| Piece {
            kind: BackingKind::Ram,
            file: file.clone(),
            offset,
            len,
        };
        Buffer::new(vec![piece(6, 2), piece(0, 3), piece(9, 1)])
    }

    #[test]
    fn reading_crosses_pieces_and_stays_inside() {
        let buffer = buffer();
        let mut data = [0; 4];
        buffer.read(1, &mut data).unwrap();
        assert_eq!(&data, b"7012");
        buffer.read(2, &mut data).unwrap();
        assert_eq!(&data, b"0129");
        for offset in [3, u64::MAX] {
            assert!(matches!(
                buffer.read(offset, &mut data),
                Err(BufferError::Outside { .. })
            ));
        }
    }

    #[test]
    fn an_export_that_fails_fails_the_same_way_again() {
        let (buffer, exporter) = (buffer(), Exporter::none());
        for _ in 0..2 {
            let error = buffer.dmabuf(&exporter).unwrap_err();
            assert!(matches!(error, ExportError::Unaligned { index: 0, .. }));
        }
    }
}
