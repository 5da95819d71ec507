//! Memory of a passed-through device as the processor reads it. Its dma-buf cannot be mapped, so slices of the
//! descriptor of the device are mapped one behind the other, read only.
//!
//! The guest may switch the memory off at any moment, and touching it then raises SIGBUS. So nothing in this
//! process touches it: the kernel copies, and returns an error instead.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use fanlight_arch::layout::PAGE_SIZE;

use super::export::Piece;
use crate::sys::{memfd, reservation::Reservation};

/// Mappings of one view. Linux gives a process 65530 (`vm.max_map_count`), and there may be several views.
const MAX_SLICES: usize = 8192;

/// Pieces of device memory behind each other.
#[derive(Debug)]
pub struct View {
    slices: Reservation,
    /// What the kernel copies into.
    copy: File,
}

impl View {
    /// Maps `pieces`, one behind the other. All must start at pages, and all but the last must end there. Where no
    /// slice is mapped, nothing can be read.
    pub fn new(pieces: &[Piece]) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let whole = |value: u64| value.is_multiple_of(PAGE_SIZE);
        let (last, others) = pieces.split_last().ok_or_else(invalid)?;
        let aligned = pieces.iter().all(|piece| whole(piece.offset));
        if !aligned || !others.iter().all(|piece| whole(piece.len)) || others.len() >= MAX_SLICES {
            return Err(invalid());
        }
        let others_len = others
            .iter()
            .try_fold(0u64, |sum, piece| sum.checked_add(piece.len));
        let len = others_len
            .and_then(|sum| sum.checked_add(last.len))
            .and_then(|sum| sum.checked_next_multiple_of(PAGE_SIZE))
            .and_then(|sum| usize::try_from(sum).ok());
        let len = len.ok_or_else(invalid)?;
        let copy = memfd::empty("fanlight-view")?;
        let slices = Reservation::new(len)?;
        let mut at = 0;
        for piece in pieces {
            let slice = piece.len.next_multiple_of(PAGE_SIZE);
            slices.map(at, slice, &piece.file, piece.offset, false)?;
            at += slice;
        }
        Ok(Self { slices, copy })
    }

    /// Copies bytes from `offset` on. Fails if the memory is not there, or is off now.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(data.len() as u64);
        if end.is_none_or(|end| end > self.slices.len() as u64) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut done = 0;
        while done < data.len() {
            let from = self.slices.address(offset + done as u64);
            let (left, to) = (data.len() - done, done as libc::off_t);
            // SAFETY: the kernel reads memory of the reservation, and says EFAULT where it cannot.
            let copied = unsafe { libc::pwrite(self.copy.as_raw_fd(), from, left, to) };
            match usize::try_from(copied) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(copied) => done += copied,
                Err(_) => return Err(io::Error::last_os_error()),
            }
        }
        self.copy.read_exact_at(data, 0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::memory::BackingKind;

    const PAGE: u64 = PAGE_SIZE;

    /// A file of four pages, each full of its number.
    fn file() -> Arc<File> {
        let file = tempfile::tempfile().unwrap();
        for page in 0..4u8 {
            file.write_all_at(&[page; PAGE as usize], u64::from(page) * PAGE)
                .unwrap();
        }
        Arc::new(file)
    }

    fn piece(file: &Arc<File>, offset: u64, len: u64) -> Piece {
        Piece {
            kind: BackingKind::Bar {
                device: 0,
                region: 2,
                start: 0,
            },
            file: file.clone(),
            offset,
            len,
        }
    }

    #[test]
    fn slices_lie_behind_each_other() {
        let file = file();
        let view = View::new(&[piece(&file, 3 * PAGE, PAGE), piece(&file, PAGE, 100)]).unwrap();
        let mut data = [9; 8];
        view.read(PAGE - 4, &mut data).unwrap();
        assert_eq!(data, [3, 3, 3, 3, 1, 1, 1, 1]);
        assert!(view.read(2 * PAGE - 4, &mut data).is_err());
        assert!(view.read(u64::MAX, &mut data).is_err());
    }

    #[test]
    fn memory_that_is_gone_is_an_error_and_no_signal() {
        let file = file();
        let view = View::new(&[piece(&file, 2 * PAGE, 2 * PAGE)]).unwrap();
        let mut data = [0; 16];
        view.read(PAGE, &mut data).unwrap();
        // A truncated file faults as a device does while its memory is off.
        file.set_len(3 * PAGE).unwrap();
        view.read(0, &mut data).unwrap();
        assert!(view.read(PAGE, &mut data).is_err());
        assert!(view.read(PAGE - 8, &mut data).is_err());
        file.set_len(4 * PAGE).unwrap();
        view.read(PAGE, &mut data).unwrap();
        assert_eq!(data, [0; 16]);
    }

    #[test]
    fn what_cannot_be_mapped_whole_is_refused() {
        let file = file();
        assert!(View::new(&[]).is_err());
        assert!(View::new(&[piece(&file, 8, PAGE)]).is_err());
        assert!(View::new(&[piece(&file, 0, 8), piece(&file, PAGE, PAGE)]).is_err());
        let long = piece(&file, 0, u64::MAX - PAGE + 1);
        assert!(View::new(&[long.clone(), long]).is_err());
    }
}
