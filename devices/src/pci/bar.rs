//! Base address registers: sizing, and keeping the address maps in step with what the guest writes.

use std::sync::Arc;

use super::config::{COMMAND_IO, COMMAND_MEMORY, ConfigSpace, reg};
use crate::memory::{AddressSpace, IoHandler};

/// What a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Ports.
    Io,
    /// 32-bit memory, not prefetchable.
    Memory32,
    /// 64-bit memory; takes two registers.
    Memory64 {
        /// Whether reads have no side effects, which is what bridges may forward above 4 GiB.
        prefetchable: bool,
    },
}

impl BarKind {
    /// The register's fixed low bits (PCI 3.0, 6.2.5.1).
    fn flags(self) -> u32 {
        match self {
            BarKind::Io => 0b01,
            BarKind::Memory32 => 0b0000,
            BarKind::Memory64 {
                prefetchable: false,
            } => 0b0100,
            BarKind::Memory64 { prefetchable: true } => 0b1100,
        }
    }
}

/// A device behind a BAR that wants to know where it lies: doorbells move with it.
pub trait BarHandler: IoHandler {
    /// The BAR starts to be decoded at an address, or stops to be.
    fn mapped(&self, address: Option<u64>);
}

/// What lies behind a BAR.
#[derive(Clone)]
pub enum BarContent {
    /// Registers that a device answers.
    Registers(Arc<dyn BarHandler>),
}

/// A BAR as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarReport {
    /// Register index.
    pub index: usize,
    /// What it decodes.
    pub kind: BarKind,
    /// Size in bytes.
    pub size: u64,
    /// Where it lies in the address map, if it does.
    pub address: Option<u64>,
}

struct Bar {
    index: usize,
    kind: BarKind,
    size: u64,
    content: BarContent,
    /// Where it lies in the address map now.
    at: Option<u64>,
}

/// The BARs of one function.
#[derive(Default)]
pub struct Bars {
    bars: Vec<Bar>,
    memory: Arc<AddressSpace>,
    ports: Arc<AddressSpace>,
}

impl Bars {
    /// A function without BARs in the given maps.
    pub fn new(memory: Arc<AddressSpace>, ports: Arc<AddressSpace>) -> Self {
        Self {
            bars: Vec::new(),
            memory,
            ports,
        }
    }

    /// Adds the BAR of register `index` (0 to 5) to `config`.
    ///
    /// # Panics
    /// If `size` is not a power of two of at least 16 bytes: sizes are constants of each device.
    pub fn add(
        &mut self,
        config: &mut ConfigSpace,
        index: usize,
        kind: BarKind,
        size: u64,
        content: BarContent,
    ) {
        assert!(
            size.is_power_of_two() && size >= 16,
            "BAR {index} of {size:#x} bytes"
        );
        let register = reg::BASE_ADDRESS_0 + index * 4;
        let mask = !(size - 1);
        config.set(register, &kind.flags().to_le_bytes());
        config.set_writable(register, &(mask as u32).to_le_bytes());
        if let BarKind::Memory64 { .. } = kind {
            config.set_writable(register + 4, &((mask >> 32) as u32).to_le_bytes());
        }
        self.bars.push(Bar {
            index,
            kind,
            size,
            content,
            at: None,
        });
    }

    /// Register index, kind and size of each.
    pub fn list(&self) -> Vec<(usize, BarKind, u64)> {
        self.bars
            .iter()
            .map(|bar| (bar.index, bar.kind, bar.size))
            .collect()
    }

    /// What each is and where it lies.
    pub fn report(&self) -> Vec<BarReport> {
        self.bars
            .iter()
            .map(|bar| BarReport {
                index: bar.index,
                kind: bar.kind,
                size: bar.size,
                address: bar.at,
            })
            .collect()
    }

    /// Writes an address into the registers of BAR `index`.
    pub fn place(&mut self, config: &mut ConfigSpace, index: usize, address: u64) {
        let Some(bar) = self.bars.iter().find(|bar| bar.index == index) else {
            return;
        };
        let register = reg::BASE_ADDRESS_0 + index * 4;
        config.write(register, &(address as u32).to_le_bytes());
        if let BarKind::Memory64 { .. } = bar.kind {
            config.write(register + 4, &((address >> 32) as u32).to_le_bytes());
        }
    }

    /// Brings the address maps in line with the registers. Called after each write to COMMAND or a BAR.
    pub fn update(&mut self, config: &ConfigSpace) {
        let Self {
            bars,
            memory,
            ports,
        } = self;
        let wanted: Vec<_> = bars.iter().map(|bar| bar.wanted(config)).collect();
        // First all that go, so that two BARs can change places.
        for (bar, wanted) in bars.iter_mut().zip(&wanted) {
            if bar.at != *wanted {
                bar.unmap(memory, ports);
            }
        }
        for (bar, wanted) in bars.iter_mut().zip(&wanted) {
            if let (None, Some(address)) = (bar.at, *wanted) {
                bar.map(address, memory, ports);
            }
        }
    }
}

impl Bar {
    /// Where the registers say it lies, if it is decoded. An address of all ones is the guest asking for
    /// the size, and 0 is a BAR that nobody has placed.
    fn wanted(&self, config: &ConfigSpace) -> Option<u64> {
        let register = reg::BASE_ADDRESS_0 + self.index * 4;
        let low = u64::from(config.u32(register));
        let (enable, limit, address) = match self.kind {
            BarKind::Io => (COMMAND_IO, 0xffff, low & !3),
            BarKind::Memory32 => (COMMAND_MEMORY, u64::from(u32::MAX), low & !0xf),
            BarKind::Memory64 { .. } => (
                COMMAND_MEMORY,
                u64::MAX,
                low & !0xf | u64::from(config.u32(register + 4)) << 32,
            ),
        };
        let last = address.checked_add(self.size - 1)?;
        let sizing = last == limit;
        (config.command() & enable != 0 && address != 0 && last <= limit && !sizing)
            .then_some(address)
    }

    fn map(&mut self, address: u64, memory: &AddressSpace, ports: &AddressSpace) {
        let BarContent::Registers(handler) = &self.content;
        let space = if self.kind == BarKind::Io {
            ports
        } else {
            memory
        };
        match space.insert_io(address, self.size, handler.clone()) {
            Ok(()) => {
                self.at = Some(address);
                handler.mapped(Some(address));
            }
            // The guest put it over something else: nothing answers there, as on a real bus.
            Err(error) => tracing::warn!(%error, index = self.index, "the guest misplaced a BAR"),
        }
    }

    fn unmap(&mut self, memory: &AddressSpace, ports: &AddressSpace) {
        let Some(address) = self.at.take() else {
            return;
        };
        let BarContent::Registers(handler) = &self.content;
        handler.mapped(None);
        let space = if self.kind == BarKind::Io {
            ports
        } else {
            memory
        };
        if let Err(error) = space.remove(address, self.size) {
            tracing::error!(%error, index = self.index, "a BAR was not where it should be");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::pci::Identity;

    #[derive(Default)]
    struct Device(Mutex<Vec<Option<u64>>>);

    impl IoHandler for Device {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }

    impl BarHandler for Device {
        fn mapped(&self, address: Option<u64>) {
            self.0.lock().unwrap().push(address);
        }
    }

    struct Setup {
        config: ConfigSpace,
        bars: Bars,
        memory: Arc<AddressSpace>,
        device: Arc<Device>,
    }

    fn setup(kind: BarKind, size: u64) -> Setup {
        let identity = Identity {
            vendor: 1,
            device: 2,
            class: 0,
            revision: 0,
            subsystem: (0, 0),
        };
        let memory = Arc::new(AddressSpace::new());
        let device = Arc::new(Device::default());
        let mut config = ConfigSpace::new(0, identity);
        let mut bars = Bars::new(memory.clone(), Arc::default());
        bars.add(
            &mut config,
            0,
            kind,
            size,
            BarContent::Registers(device.clone()),
        );
        Setup {
            config,
            bars,
            memory,
            device,
        }
    }

    const MEMORY64: BarKind = BarKind::Memory64 { prefetchable: true };

    #[test]
    fn sizing_answers_the_size() {
        for size in [1 << 14, 1 << 34] {
            let mut s = setup(MEMORY64, size);
            s.config.write(0x10, &[0xff; 4]);
            s.config.write(0x14, &[0xff; 4]);
            let raw = u64::from(s.config.u32(0x10)) | u64::from(s.config.u32(0x14)) << 32;
            assert_eq!(raw & 0xf, 0b1100);
            assert_eq!(!(raw & !0xf) + 1, size);
        }
    }

    #[test]
    fn decoding_follows_enable_and_moves() {
        let mut s = setup(MEMORY64, 0x1000);
        s.bars.place(&mut s.config, 0, 0x1_2345_6000);
        s.bars.update(&s.config);
        assert!(s.memory.lookup(0x1_2345_6000).is_none());
        s.config.write(reg::COMMAND, &[COMMAND_MEMORY as u8]);
        s.bars.update(&s.config);
        assert!(s.memory.lookup(0x1_2345_6fff).is_some());
        s.config.write(0x14, &[2]);
        s.bars.update(&s.config);
        assert!(s.memory.lookup(0x1_2345_6000).is_none());
        assert!(s.memory.lookup(0x2_2345_6000).is_some());
        s.config.write(reg::COMMAND, &[0]);
        s.bars.update(&s.config);
        assert!(s.memory.lookup(0x2_2345_6000).is_none());
        assert_eq!(
            *s.device.0.lock().unwrap(),
            [Some(0x1_2345_6000), None, Some(0x2_2345_6000), None]
        );
    }

    #[test]
    fn sizing_while_decoding_maps_nothing_at_the_top() {
        let mut s = setup(BarKind::Memory32, 0x1000);
        s.config.write(reg::COMMAND, &[COMMAND_MEMORY as u8]);
        s.config.write(0x10, &[0xff; 4]);
        s.bars.update(&s.config);
        assert!(s.memory.lookup(0xffff_f000).is_none());
    }

    #[test]
    fn a_bar_over_something_else_is_not_decoded() {
        let mut s = setup(MEMORY64, 0x1000);
        s.memory
            .insert_io(0x10000, 0x800, Arc::new(Device::default()))
            .unwrap();
        s.bars.place(&mut s.config, 0, 0x10000);
        s.config.write(reg::COMMAND, &[COMMAND_MEMORY as u8]);
        s.bars.update(&s.config);
        assert!(s.device.0.lock().unwrap().is_empty());
        s.bars.place(&mut s.config, 0, 0x20000);
        s.bars.update(&s.config);
        assert_eq!(*s.device.0.lock().unwrap(), [Some(0x20000)]);
    }
}
