//! A PCI Express root port: a type 1 bridge to a bus of its own. It has no access control services, so
//! functions below it may reach each other.
//!
//! Configuration accesses are routed by the bus numbers that the guest programs. Its windows are kept
//! for the guest to read back; what functions behind it decode follows from their own BARs alone.

use std::{
    ops::RangeInclusive,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    BarKind, Capability, ConfigSpace, Identity, PciBus, PciFunction,
    config::{COMMAND_BUS_MASTER, COMMAND_IO, COMMAND_MEMORY, reg},
};

/// Red Hat's id for a PCI Express root port (QEMU `docs/specs/pci-ids`).
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x000c,
    class: 0x06_0400,
    revision: 0,
    subsystem: (0, 0),
};

const CAP_ID_PCI_EXPRESS: u8 = 0x10;
/// PCI Express Capabilities Register: version 2, root port, slot implemented.
const EXPRESS_ROOT_PORT: u16 = 2 | 4 << 4 | 1 << 8;
/// Link Capabilities and Status: 2.5 GT/s, one lane.
const LINK_SPEED_WIDTH: u16 = 1 | 1 << 4;
/// Slot Status: presence detect state. What is behind the port was there from the start.
const SLOT_PRESENCE: u16 = 1 << 6;

/// Granularity of memory windows.
const MEMORY_UNIT: u64 = 1 << 20;
/// Low bits of the prefetchable window's registers: 64 bits.
const PREFETCHABLE_64: u16 = 1;

/// A root port and the bus behind it.
pub struct RootPort {
    config: Mutex<ConfigSpace>,
    /// The bus behind the port.
    pub bus: Arc<PciBus>,
}

impl RootPort {
    /// The port of physical slot `slot`, with nothing behind it.
    pub fn new(slot: u8) -> Self {
        let mut config = ConfigSpace::new(1, IDENTITY);
        config.set_writable(reg::PRIMARY_BUS, &[0xff; 3]);
        config.set_writable(reg::IO_BASE, &[0xf0, 0xf0]);
        config.set_writable(reg::MEMORY_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
        config.set(reg::PREFETCHABLE_BASE, &PREFETCHABLE_64.to_le_bytes());
        config.set(reg::PREFETCHABLE_LIMIT, &PREFETCHABLE_64.to_le_bytes());
        config.set_writable(reg::PREFETCHABLE_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
        config.set_writable(reg::PREFETCHABLE_BASE_UPPER, &[0xff; 8]);
        // SERR, VGA and reset bits mean nothing here, but software may set them.
        config.set_writable(reg::BRIDGE_CONTROL, &[0x4f, 0]);
        config.add_capability(&express(slot));
        let port = Self {
            config: Mutex::new(config),
            bus: Arc::default(),
        };
        port.set_windows(None, None);
        port
    }

    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The buses whose configuration accesses the port forwards; its secondary bus is the first.
    pub fn forwarded_buses(&self) -> RangeInclusive<u8> {
        let config = self.lock();
        let [secondary, subordinate] = config.u16(reg::SECONDARY_BUS).to_le_bytes();
        secondary..=subordinate
    }

    /// Numbers the buses. For the machine, before the guest runs.
    pub fn set_buses(&self, primary: u8, secondary: u8, subordinate: u8) {
        self.lock()
            .set(reg::PRIMARY_BUS, &[primary, secondary, subordinate]);
    }

    /// Opens the windows, half-open ranges of whole MiB, and forwards accesses; `None` closes one.
    pub fn set_windows(&self, memory: Option<(u64, u64)>, prefetchable: Option<(u64, u64)>) {
        /// A window whose limit is below its base is closed.
        const CLOSED: (u64, u64) = (MEMORY_UNIT, MEMORY_UNIT);
        let field = |address: u64| ((address >> 16) as u16 & 0xfff0).to_le_bytes();
        let mut config = self.lock();
        let (base, end) = memory.unwrap_or(CLOSED);
        config.write(reg::MEMORY_BASE, &field(base));
        config.write(reg::MEMORY_LIMIT, &field(end - MEMORY_UNIT));
        let (base, end) = prefetchable.unwrap_or(CLOSED);
        let last = end - MEMORY_UNIT;
        config.write(reg::PREFETCHABLE_BASE, &field(base));
        config.write(reg::PREFETCHABLE_LIMIT, &field(last));
        config.write(
            reg::PREFETCHABLE_BASE_UPPER,
            &((base >> 32) as u32).to_le_bytes(),
        );
        config.write(
            reg::PREFETCHABLE_LIMIT_UPPER,
            &((last >> 32) as u32).to_le_bytes(),
        );
        config.write(reg::IO_BASE, &[0xf0, 0x00]);
        let command = COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER;
        config.write(reg::COMMAND, &command.to_le_bytes());
    }
}

/// The PCI Express capability of a root port (PCI Express 5.0, 7.5.3).
fn express(slot: u8) -> Capability {
    const SIZE: usize = 0x3c;
    let mut body = vec![0; SIZE - 2];
    let mut put = |offset: usize, bytes: &[u8]| {
        body[offset - 2..offset - 2 + bytes.len()].copy_from_slice(bytes);
    };
    put(0x02, &EXPRESS_ROOT_PORT.to_le_bytes());
    let port = u32::from(slot) << 24;
    put(0x0c, &(u32::from(LINK_SPEED_WIDTH) | port).to_le_bytes());
    put(0x12, &LINK_SPEED_WIDTH.to_le_bytes());
    put(0x14, &(u32::from(slot) << 19).to_le_bytes());
    put(0x1a, &SLOT_PRESENCE.to_le_bytes());
    Capability {
        id: CAP_ID_PCI_EXPRESS,
        body,
        writable: vec![],
    }
}

impl PciFunction for RootPort {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset.into(), data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.lock().write(offset.into(), data);
    }

    fn bars(&self) -> Vec<(usize, BarKind, u64)> {
        Vec::new()
    }

    fn place_bar(&self, _index: usize, _address: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_read_back_as_programmed() {
        let port = RootPort::new(1);
        port.set_windows(
            Some((0xc010_0000, 0xc030_0000)),
            Some((0x80_0000_0000, 0x81_0000_0000)),
        );
        let config = port.lock();
        assert_eq!(config.u32(reg::MEMORY_BASE), 0xc020_c010);
        assert_eq!(config.u32(reg::PREFETCHABLE_BASE), 0xfff1_0001);
        assert_eq!(config.u32(reg::PREFETCHABLE_BASE_UPPER), 0x80);
        assert_eq!(config.u32(reg::PREFETCHABLE_LIMIT_UPPER), 0x80);
    }

    #[test]
    fn a_new_port_forwards_nothing() {
        let config = RootPort::new(1).config.into_inner().unwrap();
        assert!(config.u16(reg::MEMORY_BASE) > config.u16(reg::MEMORY_LIMIT));
        assert!(config.u16(reg::PREFETCHABLE_BASE) > config.u16(reg::PREFETCHABLE_LIMIT));
    }
}
