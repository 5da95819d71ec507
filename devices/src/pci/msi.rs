//! MSI: one message of one function (PCI 3.0, 6.8.1).

use std::sync::Arc;

use super::config::{Capability, ConfigSpace};
use crate::hypervisor::{MsiMessage, MsiVector};

const CAP_ID_MSI: u8 = 0x05;
/// Message Control: the enable bit, which the guest may write.
const CONTROL_ENABLE: u16 = 1 << 0;
/// Message Control: the address has 64 bits.
const CONTROL_64BIT: u16 = 1 << 7;
/// Offsets in the capability.
const CONTROL: usize = 2;
const ADDRESS: usize = 4;
const ADDRESS_UPPER: usize = 8;
const DATA: usize = 12;
const SIZE: usize = 14;

/// The capability with one vector.
#[derive(Debug)]
pub struct Msi {
    vector: Arc<dyn MsiVector>,
    at: usize,
}

impl Msi {
    /// Adds the capability to `config`.
    pub fn new(config: &mut ConfigSpace, vector: Arc<dyn MsiVector>) -> Self {
        let mut body = vec![0; SIZE - 2];
        body[..2].copy_from_slice(&CONTROL_64BIT.to_le_bytes());
        let mut writable = vec![(CONTROL - 2, CONTROL_ENABLE as u8), (ADDRESS - 2, 0xfc)];
        writable.extend((ADDRESS + 1..SIZE).map(|at| (at - 2, 0xff)));
        let at = config.add_capability(&Capability {
            id: CAP_ID_MSI,
            body,
            writable,
        });
        Self { vector, at }
    }

    /// Whether a write of `len` bytes at `offset` changes it.
    pub fn touched(&self, offset: usize, len: usize) -> bool {
        offset < self.at + SIZE && self.at < offset + len
    }

    /// Makes the vector match the registers.
    pub fn update(&self, config: &ConfigSpace) {
        let message = MsiMessage {
            address: u64::from(config.u32(self.at + ADDRESS))
                | u64::from(config.u32(self.at + ADDRESS_UPPER)) << 32,
            data: config.u16(self.at + DATA).into(),
        };
        let result = if config.u16(self.at + CONTROL) & CONTROL_ENABLE != 0 {
            self.vector.unmask(message)
        } else {
            self.vector.mask()
        };
        if let Err(error) = result {
            tracing::warn!(%error, ?message, "cannot route an interrupt");
        }
    }

    /// Raises the interrupt.
    pub fn raise(&self) {
        if let Err(error) = self.vector.event().write(1) {
            tracing::error!(%error, "cannot raise an interrupt");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        hypervisor::{Hypervisor, test_util::FakeHypervisor},
        pci::Identity,
    };

    #[test]
    fn the_vector_follows_the_registers() {
        let hypervisor = FakeHypervisor::default();
        let identity = Identity {
            vendor: 1,
            device: 2,
            class: 0,
            revision: 0,
            subsystem: (0, 0),
        };
        let mut config = ConfigSpace::new(0, identity);
        let msi = Msi::new(&mut config, hypervisor.msi_vector().unwrap());
        config.write(msi.at + ADDRESS, &0xfee0_1003u32.to_le_bytes());
        config.write(msi.at + DATA, &0x41u16.to_le_bytes());
        msi.update(&config);
        assert_eq!(hypervisor.routes(), [None]);
        config.write(msi.at + CONTROL, &[1, 0]);
        assert!(msi.touched(msi.at + CONTROL, 2) && !msi.touched(msi.at + SIZE, 4));
        msi.update(&config);
        let message = MsiMessage {
            address: 0xfee0_1000,
            data: 0x41,
        };
        assert_eq!(hypervisor.routes(), [Some(message)]);
    }
}
