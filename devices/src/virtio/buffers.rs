//! Buffers of a request: ranges of guest memory that are read or written as one sequence of bytes.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, VolatileSlice};

use crate::GuestMemory;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub address: GuestAddress,
    pub len: u32,
}

/// Buffers of a request in order; their bytes are one sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buffers(pub(super) Vec<Span>);

impl Buffers {
    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.0.iter().map(|span| u64::from(span.len)).sum()
    }

    /// Whether there is not a single byte.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes the first `count` bytes off, or as many as there are.
    pub fn take_front(&mut self, count: u64) -> Buffers {
        let mut left = count;
        let whole = self.0.iter().take_while(|span| {
            let fits = u64::from(span.len) <= left;
            left -= if fits { u64::from(span.len) } else { 0 };
            fits
        });
        let whole = whole.count();
        let mut taken: Vec<_> = self.0.drain(..whole).collect();
        if left > 0
            && let Some(first) = self.0.first_mut()
        {
            taken.push(Span {
                address: first.address,
                len: left as u32,
            });
            first.address = GuestAddress(first.address.0 + left);
            first.len -= left as u32;
        }
        Buffers(taken)
    }

    /// Reads all bytes into `data`, which must be as long; what is missing stays as it is.
    pub fn read(&self, mem: &GuestMemory, data: &mut [u8]) -> Result<(), GuestMemoryError> {
        let mut rest = data;
        for span in &self.0 {
            let len = rest.len().min(span.len as usize);
            let (part, after) = rest.split_at_mut(len);
            mem.read_slice(part, span.address)?;
            rest = after;
        }
        Ok(())
    }

    /// Writes `data` from the first byte on. Returns how many bytes found room.
    pub fn write(&self, mem: &GuestMemory, data: &[u8]) -> Result<usize, GuestMemoryError> {
        let mut rest = data;
        for span in &self.0 {
            let (part, after) = rest.split_at(rest.len().min(span.len as usize));
            mem.write_slice(part, span.address)?;
            rest = after;
        }
        Ok(data.len() - rest.len())
    }

    /// Where they are: addresses and lengths.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let spans = self.0.iter();
        spans.map(|span| (span.address.0, span.len.into()))
    }

    /// The bytes in place.
    pub fn slices<'a>(
        &self,
        mem: &'a GuestMemory,
    ) -> Result<Vec<VolatileSlice<'a>>, GuestMemoryError> {
        let spans = self.0.iter();
        spans
            .map(|span| mem.get_slice(span.address, span.len as usize))
            .collect()
    }
}
