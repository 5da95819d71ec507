//! MSI-X: the capability, the table and the pending bits (PCI 3.0, 6.8.2).
//!
//! A vector that is masked, alone or with its function, is detached from the interrupt controller. Signals of the
//! device then stay in the event descriptor, which is the pending bit.

use std::{io, sync::Arc};

use thiserror::Error;

use super::config::Capability;
use crate::hypervisor::{Hypervisor, MsiMessage, MsiVector};

const CAP_ID_MSIX: u8 = 0x11;
/// Bytes of a table entry.
pub const TABLE_ENTRY: u64 = 16;
/// Bytes of the pending-bit array for 64 vectors.
pub const PBA_ENTRY: u64 = 8;
/// The most vectors a function can have.
const MAX_VECTORS: u16 = 2048;

/// Message Control: function mask and enable, which the guest may write.
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const CONTROL_ENABLE: u16 = 1 << 15;
/// Vector Control: the only bit with a meaning.
const VECTOR_MASKED: u32 = 1;

/// Why a function has no MSI-X.
#[derive(Debug, Error)]
pub enum MsixError {
    /// More vectors than the table can hold.
    #[error("{0} MSI-X vectors: a function has 1 to {MAX_VECTORS}")]
    Count(u16),
    /// The host gave no vector.
    #[error("cannot make MSI-X vector {index}")]
    Vector {
        /// Which one.
        index: u16,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

#[derive(Debug)]
struct Entry {
    message: MsiMessage,
    control: u32,
    vector: Arc<dyn MsiVector>,
}

/// State of MSI-X of one function.
#[derive(Debug)]
pub struct Msix {
    entries: Vec<Entry>,
    enabled: bool,
    function_masked: bool,
}

impl Msix {
    /// `count` vectors, all masked.
    pub fn new(hypervisor: &dyn Hypervisor, count: u16) -> Result<Self, MsixError> {
        if count == 0 || count > MAX_VECTORS {
            return Err(MsixError::Count(count));
        }
        let entries = (0..count)
            .map(|index| {
                Ok(Entry {
                    message: MsiMessage::default(),
                    control: VECTOR_MASKED,
                    vector: hypervisor
                        .msi_vector()
                        .map_err(|source| MsixError::Vector { index, source })?,
                })
            })
            .collect::<Result<_, MsixError>>()?;
        Ok(Self {
            entries,
            enabled: false,
            function_masked: false,
        })
    }

    /// The capability, with table and pending bits at the given offsets of BAR `bar`.
    pub fn capability(&self, bar: u8, table: u32, pba: u32) -> Capability {
        let size = self.entries.len() as u16 - 1;
        let mut body = size.to_le_bytes().to_vec();
        body.extend((table | u32::from(bar)).to_le_bytes());
        body.extend((pba | u32::from(bar)).to_le_bytes());
        Capability {
            id: CAP_ID_MSIX,
            body,
            writable: vec![(1, ((CONTROL_FUNCTION_MASK | CONTROL_ENABLE) >> 8) as u8)],
        }
    }

    /// The vector, if there is one of that number.
    pub fn vector(&self, index: u16) -> Option<Arc<dyn MsiVector>> {
        self.entries
            .get(usize::from(index))
            .map(|entry| entry.vector.clone())
    }

    /// How many vectors there are.
    pub fn count(&self) -> u16 {
        self.entries.len() as u16
    }

    /// Whether the function may signal anything.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// The vectors that are not masked.
    pub fn unmasked(&self) -> impl Iterator<Item = u16> + '_ {
        (0..)
            .zip(&self.entries)
            .filter_map(|(index, entry)| (!self.is_masked(entry)).then_some(index))
    }

    /// The guest wrote Message Control.
    pub fn set_control(&mut self, control: u16) {
        self.enabled = control & CONTROL_ENABLE != 0;
        self.function_masked = control & CONTROL_FUNCTION_MASK != 0;
        for index in 0..self.entries.len() {
            self.apply(index);
        }
    }

    /// Reset: all vectors masked, no messages.
    pub fn reset(&mut self) {
        for entry in &mut self.entries {
            entry.message = MsiMessage::default();
            entry.control = VECTOR_MASKED;
        }
        self.set_control(0);
    }

    /// The guest reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let entry = usize::try_from(offset / TABLE_ENTRY)
            .ok()
            .and_then(|index| self.entries.get(index));
        let Some(entry) = entry else { return };
        let mut bytes = [0; TABLE_ENTRY as usize];
        bytes[..8].copy_from_slice(&entry.message.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&entry.message.data.to_le_bytes());
        bytes[12..].copy_from_slice(&entry.control.to_le_bytes());
        let at = (offset % TABLE_ENTRY) as usize;
        if let Some(bytes) = bytes.get(at..at + data.len()) {
            data.copy_from_slice(bytes);
        }
    }

    /// The guest writes the table: whole double words or two of them; others have no defined effect.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let Ok(index) = usize::try_from(offset / TABLE_ENTRY) else {
            return;
        };
        let Some(entry) = self.entries.get_mut(index) else {
            return;
        };
        let (words, []) = data.as_chunks::<4>() else {
            return;
        };
        if !offset.is_multiple_of(4) {
            return;
        }
        for (field, word) in (offset % TABLE_ENTRY / 4..4).zip(words) {
            let word = u32::from_le_bytes(*word);
            let message = &mut entry.message;
            match field {
                0 => message.address = message.address & !0xffff_ffff | u64::from(word),
                1 => message.address = message.address & 0xffff_ffff | u64::from(word) << 32,
                2 => message.data = word,
                _ => entry.control = word & VECTOR_MASKED,
            }
        }
        self.apply(index);
    }

    /// The guest reads the pending bits.
    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        let first = usize::try_from(offset.saturating_mul(8)).unwrap_or(usize::MAX);
        let entries = self.entries.get(first..).unwrap_or_default();
        for (byte, entries) in data.iter_mut().zip(entries.chunks(8)) {
            *byte = (0..).zip(entries).fold(0, |bits, (bit, entry)| {
                let pending = self.is_masked(entry) && entry.vector.is_pending();
                bits | u8::from(pending) << bit
            });
        }
    }

    fn is_masked(&self, entry: &Entry) -> bool {
        !self.enabled || self.function_masked || entry.control & VECTOR_MASKED != 0
    }

    /// Attaches or detaches a vector as the registers say.
    fn apply(&self, index: usize) {
        let entry = &self.entries[index];
        let result = if self.is_masked(entry) {
            entry.vector.mask()
        } else {
            entry.vector.unmask(entry.message)
        };
        if let Err(error) = result {
            tracing::warn!(%error, index, message = ?entry.message, "cannot route an interrupt");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::test_util::FakeHypervisor;

    fn write_message(msix: &mut Msix, index: u64, address: u32, data: u32) {
        let at = index * TABLE_ENTRY;
        msix.write_table(at, &address.to_le_bytes());
        msix.write_table(at + 4, &[0; 4]);
        msix.write_table(at + 8, &data.to_le_bytes());
    }

    #[test]
    fn a_masked_vector_is_pending_until_it_is_unmasked() {
        let hypervisor = FakeHypervisor::default();
        let mut msix = Msix::new(&hypervisor, 3).unwrap();
        msix.set_control(CONTROL_ENABLE);
        write_message(&mut msix, 1, 0xfee0_0000, 0x41);
        msix.vector(1).unwrap().event().write(1).unwrap();
        let mut pba = [0; 8];
        msix.read_pba(0, &mut pba);
        assert_eq!(pba, [0b10, 0, 0, 0, 0, 0, 0, 0]);
        msix.write_table(TABLE_ENTRY + 12, &[0; 4]);
        let message = MsiMessage {
            address: 0xfee0_0000,
            data: 0x41,
        };
        assert_eq!(hypervisor.routes(), [None, Some(message), None]);
    }

    #[test]
    fn function_mask_and_disable_detach_all() {
        let hypervisor = FakeHypervisor::default();
        let mut msix = Msix::new(&hypervisor, 2).unwrap();
        msix.write_table(12, &[0; 4]);
        assert_eq!(hypervisor.routes(), [None, None]);
        msix.set_control(CONTROL_ENABLE);
        assert!(hypervisor.routes()[0].is_some());
        msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        assert_eq!(hypervisor.routes(), [None, None]);
    }

    #[test]
    fn an_unmasked_vector_is_rerouted_when_its_entry_changes() {
        let hypervisor = FakeHypervisor::default();
        let mut msix = Msix::new(&hypervisor, 1).unwrap();
        msix.set_control(CONTROL_ENABLE);
        msix.write_table(12, &[0; 4]);
        msix.write_table(8, &7u32.to_le_bytes());
        assert_eq!(hypervisor.routes()[0].unwrap().data, 7);
    }

    #[test]
    fn accesses_beyond_the_table_do_nothing() {
        let hypervisor = FakeHypervisor::default();
        let mut msix = Msix::new(&hypervisor, 1).unwrap();
        msix.write_table(TABLE_ENTRY, &[1; 4]);
        msix.write_table(u64::MAX - 3, &[1; 4]);
        msix.write_table(2, &[1; 4]);
        let mut data = [0; 8];
        msix.read_table(12, &mut data);
        msix.read_pba(u64::MAX - 7, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
