//! Configuration space: 4 KiB of registers. Each bit is either fixed or writable.

/// Size of a function's configuration space.
pub const CONFIG_SPACE_SIZE: usize = 4096;

/// Offsets of the header's registers (PCI 3.0, 6.1; PCI-to-PCI Bridge 1.2, 3.2).
pub mod reg {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const VENDOR_ID: usize = 0x00;
    pub const DEVICE_ID: usize = 0x02;
    pub const COMMAND: usize = 0x04;
    pub const STATUS: usize = 0x06;
    pub const REVISION_ID: usize = 0x08;
    pub const CLASS_CODE: usize = 0x09;
    pub const CACHE_LINE_SIZE: usize = 0x0c;
    pub const HEADER_TYPE: usize = 0x0e;
    pub const BASE_ADDRESS_0: usize = 0x10;
    pub const PRIMARY_BUS: usize = 0x18;
    pub const SECONDARY_BUS: usize = 0x19;
    pub const IO_BASE: usize = 0x1c;
    pub const MEMORY_BASE: usize = 0x20;
    pub const MEMORY_LIMIT: usize = 0x22;
    pub const PREFETCHABLE_BASE: usize = 0x24;
    pub const PREFETCHABLE_LIMIT: usize = 0x26;
    pub const PREFETCHABLE_BASE_UPPER: usize = 0x28;
    pub const PREFETCHABLE_LIMIT_UPPER: usize = 0x2c;
    pub const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
    pub const SUBSYSTEM_ID: usize = 0x2e;
    pub const EXPANSION_ROM: usize = 0x30;
    pub const CAPABILITIES_POINTER: usize = 0x34;
    pub const INTERRUPT_LINE: usize = 0x3c;
    pub const INTERRUPT_PIN: usize = 0x3d;
    pub const BRIDGE_CONTROL: usize = 0x3e;
}

/// COMMAND: respond to port accesses.
pub const COMMAND_IO: u16 = 1 << 0;
/// COMMAND: respond to memory accesses.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// COMMAND: may access memory.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// COMMAND: INTx is off.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// STATUS: there is a list of capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Where capabilities start.
const FIRST_CAPABILITY: usize = 0x40;
/// End of what capabilities may use; extended ones follow.
const LEGACY_END: usize = 0x100;

/// The identity of a function.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class code: base class, subclass, interface.
    pub class: u32,
    /// Revision ID.
    pub revision: u8,
    /// Subsystem vendor and id; type 0 only.
    pub subsystem: (u16, u16),
}

/// A capability: its id, the bytes behind the next pointer, and which bits of those the guest may write.
#[derive(Clone, Debug)]
pub struct Capability {
    /// Capability ID.
    pub id: u8,
    /// Bytes behind the next pointer.
    pub body: Vec<u8>,
    /// Offsets in `body` with the mask of writable bits there.
    pub writable: Vec<(usize, u8)>,
}

/// The registers of one function.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: Box<[u8; CONFIG_SPACE_SIZE]>,
    writable: Box<[u8; CONFIG_SPACE_SIZE]>,
    /// Where the next capability goes.
    free: usize,
    /// The register that points to the next capability.
    last_pointer: usize,
}

impl ConfigSpace {
    /// A header of the given type (0 or 1) with COMMAND, cache line size and interrupt line writable.
    pub fn new(header_type: u8, identity: Identity) -> Self {
        let mut config = Self {
            bytes: Box::new([0; CONFIG_SPACE_SIZE]),
            writable: Box::new([0; CONFIG_SPACE_SIZE]),
            free: FIRST_CAPABILITY,
            last_pointer: reg::CAPABILITIES_POINTER,
        };
        config.set(reg::VENDOR_ID, &identity.vendor.to_le_bytes());
        config.set(reg::DEVICE_ID, &identity.device.to_le_bytes());
        config.set(reg::REVISION_ID, &[identity.revision]);
        config.set(reg::CLASS_CODE, &identity.class.to_le_bytes()[..3]);
        config.set(reg::HEADER_TYPE, &[header_type]);
        if header_type == 0 {
            let (vendor, id) = identity.subsystem;
            config.set(reg::SUBSYSTEM_VENDOR_ID, &vendor.to_le_bytes());
            config.set(reg::SUBSYSTEM_ID, &id.to_le_bytes());
        }
        let command = COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        config.set_writable(reg::COMMAND, &command.to_le_bytes());
        config.set_writable(reg::CACHE_LINE_SIZE, &[0xff]);
        config.set_writable(reg::INTERRUPT_LINE, &[0xff]);
        config
    }

    /// Registers of a device of the host. The guest may write none yet.
    pub fn from_bytes(bytes: Box<[u8; CONFIG_SPACE_SIZE]>) -> Self {
        Self {
            bytes,
            writable: Box::new([0; CONFIG_SPACE_SIZE]),
            free: LEGACY_END,
            last_pointer: reg::CAPABILITIES_POINTER,
        }
    }

    /// Sets registers, whatever the guest may write.
    ///
    /// # Panics
    /// If the bytes do not fit: offsets are constants of this crate.
    pub fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Lets the guest write the bits of `mask` from `offset` on.
    ///
    /// # Panics
    /// If the bytes do not fit: offsets are constants of this crate.
    pub fn set_writable(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Appends a capability and returns its offset.
    ///
    /// # Panics
    /// If there is no room: the set of capabilities is a constant of each device.
    pub fn add_capability(&mut self, capability: &Capability) -> usize {
        let offset = self.free;
        let end = offset + 2 + capability.body.len();
        assert!(
            end <= LEGACY_END,
            "no room for capability {:#x}",
            capability.id
        );
        self.set(offset, &[capability.id, 0]);
        self.set(offset + 2, &capability.body);
        for &(at, mask) in &capability.writable {
            self.set_writable(offset + 2 + at, &[mask]);
        }
        self.set(self.last_pointer, &[offset as u8]);
        self.set(reg::STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.last_pointer = offset + 1;
        self.free = end.next_multiple_of(4);
        offset
    }

    /// The guest reads.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        match self.bytes.get(offset..offset.saturating_add(data.len())) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0xff),
        }
    }

    /// The guest writes: only writable bits change.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, value) in (offset..CONFIG_SPACE_SIZE).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | value & mask;
        }
    }

    /// A register of 16 bits.
    pub fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// A register of 32 bits.
    pub fn u32(&self, offset: usize) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset + 2)) << 16
    }

    /// The COMMAND register.
    pub fn command(&self) -> u16 {
        self.u16(reg::COMMAND)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn identity() -> Identity {
        Identity {
            vendor: 0x1af4,
            device: 0x1042,
            class: 0x01_0000,
            revision: 1,
            subsystem: (0x1af4, 2),
        }
    }

    #[test]
    fn fixed_bits_stay() {
        let mut config = ConfigSpace::new(0, identity());
        config.write(reg::VENDOR_ID, &[0, 0, 0, 0]);
        config.write(reg::COMMAND, &[0xff, 0xff]);
        assert_eq!(config.u32(reg::VENDOR_ID), 0x1042_1af4);
        assert_eq!(config.command(), 0x0407);
        assert_eq!(config.u32(reg::REVISION_ID) >> 8, 0x01_0000);
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut config = ConfigSpace::new(0, identity());
        let capability = |id| Capability {
            id,
            body: vec![0; 5],
            writable: vec![(1, 0xf0)],
        };
        let first = config.add_capability(&capability(9));
        let second = config.add_capability(&capability(0x11));
        let mut byte = [0];
        config.read(reg::CAPABILITIES_POINTER, &mut byte);
        assert_eq!(usize::from(byte[0]), first);
        config.read(first + 1, &mut byte);
        assert_eq!(usize::from(byte[0]), second);
        config.read(second + 1, &mut byte);
        assert_eq!(byte[0], 0);
        config.write(second + 2, &[0xff; 4]);
        assert_eq!(config.u32(second + 2), 0xf000);
    }

    proptest! {
        #[test]
        fn any_access_is_survived(offset in 0usize..5000, data in prop::collection::vec(any::<u8>(), 0..9)) {
            let mut config = ConfigSpace::new(1, identity());
            config.write(offset, &data);
            let mut back = data.clone();
            config.read(offset, &mut back);
            prop_assert_eq!(config.u32(reg::VENDOR_ID), 0x1042_1af4);
        }
    }
}
