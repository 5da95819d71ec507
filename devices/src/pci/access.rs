//! The two ways a guest reaches configuration space: memory (ECAM, PCI Express 5.0, 7.2.2) and the
//! ports of configuration mechanism 1 (PCI 3.0, 3.2.2.3.2).

use std::sync::{
    Arc, Weak,
    atomic::{AtomicU32, Ordering},
};

use super::{bus::PciBus, function::DevFn};
use crate::memory::IoHandler;

/// Whether a function can be asked for an access of `len` bytes at `offset`.
fn is_plain(offset: u64, len: usize) -> bool {
    matches!(len, 1 | 2 | 4) && offset % 4 + len as u64 <= 4
}

/// The memory-mapped window: 4 KiB a function, 1 MiB a bus. Functions hold the address space that contains this
/// window, so the window must not hold the functions.
pub struct Ecam(pub Weak<PciBus>);

impl Ecam {
    fn decode(offset: u64) -> (u8, DevFn, u16) {
        (
            (offset >> 20) as u8,
            DevFn((offset >> 12) as u8),
            offset as u16 & 0xfff,
        )
    }
}

impl IoHandler for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.0.upgrade() {
            Some(root) if is_plain(offset, data.len()) => {
                let (bus, place, register) = Self::decode(offset);
                root.read_config(bus, place, register, data);
            }
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(root) = self.0.upgrade()
            && is_plain(offset, data.len())
        {
            let (bus, place, register) = Self::decode(offset);
            root.write_config(bus, place, register, data);
        }
    }
}

/// CONFIG_ADDRESS and CONFIG_DATA: 8 ports.
pub struct ConfigMechanism1 {
    bus: Weak<PciBus>,
    address: AtomicU32,
}

/// How many ports the mechanism takes.
pub const MECHANISM_1_PORTS: u64 = 8;
const CONFIG_DATA: u64 = 4;
const ENABLE: u32 = 1 << 31;

impl ConfigMechanism1 {
    /// The ports in front of root bus `bus`.
    pub fn new(bus: &Arc<PciBus>) -> Self {
        Self {
            bus: Arc::downgrade(bus),
            address: AtomicU32::new(0),
        }
    }

    /// The register that CONFIG_DATA stands for, if any.
    fn target(&self, offset: u64, len: usize) -> Option<(Arc<PciBus>, u8, DevFn, u16)> {
        let within = offset.checked_sub(CONFIG_DATA)?;
        let address = self.address.load(Ordering::Acquire);
        if address & ENABLE == 0 || !is_plain(within, len) {
            return None;
        }
        let register = (address & 0xfc) as u16 | within as u16;
        let place = DevFn((address >> 8) as u8);
        Some((self.bus.upgrade()?, (address >> 16) as u8, place, register))
    }
}

impl IoHandler for ConfigMechanism1 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.target(offset, data.len()) {
            Some((root, bus, place, register)) => root.read_config(bus, place, register, data),
            None if offset == 0 && data.len() == 4 => {
                data.copy_from_slice(&self.address.load(Ordering::Acquire).to_le_bytes());
            }
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((root, bus, place, register)) = self.target(offset, data.len()) {
            root.write_config(bus, place, register, data);
        } else if let (0, Ok(address)) = (offset, data.try_into()) {
            // Only a write of all 32 bits addresses CONFIG_ADDRESS. Smaller ones address ports of other devices.
            self.address
                .store(u32::from_le_bytes(address), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::HostBridge;

    fn bus() -> Arc<PciBus> {
        let bus = Arc::new(PciBus::default());
        bus.add(Arc::new(HostBridge::default())).unwrap();
        bus
    }

    #[test]
    fn both_ways_read_the_same() {
        let bus = bus();
        let ecam = Ecam(Arc::downgrade(&bus));
        let ports = ConfigMechanism1::new(&bus);
        let (mut a, mut b) = ([0; 4], [0; 4]);
        ecam.read(8, &mut a);
        ports.write(0, &(ENABLE | 8).to_le_bytes());
        ports.read(4, &mut b);
        assert_eq!(a, b);
        let mut half = [0; 2];
        ports.read(6, &mut half);
        assert_eq!(half, a[2..]);
    }

    #[test]
    fn partial_writes_do_not_change_the_address() {
        let bus = bus();
        let ports = ConfigMechanism1::new(&bus);
        ports.write(0, &(ENABLE | 0x40).to_le_bytes());
        ports.write(0, &[0xff]);
        ports.write(1, &[0xff, 0xff]);
        let mut address = [0; 4];
        ports.read(0, &mut address);
        assert_eq!(u32::from_le_bytes(address), ENABLE | 0x40);
    }

    #[test]
    fn without_enable_and_across_double_words_all_reads_are_ones() {
        let bus = bus();
        let ecam = Ecam(Arc::downgrade(&bus));
        let ports = ConfigMechanism1::new(&bus);
        let mut data = [0; 4];
        ports.read(4, &mut data);
        assert_eq!(data, [0xff; 4]);
        data.fill(0);
        ecam.read(2, &mut data);
        assert_eq!(data, [0xff; 4]);
        let mut wide = [0; 8];
        ecam.read(0, &mut wide);
        assert_eq!(wide, [0xff; 8]);
    }
}
