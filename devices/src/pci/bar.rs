//! Base address registers: their size, and the address spaces kept in step with what the guest writes.

use std::{ops::Range, sync::Arc};

use super::config::{COMMAND_IO, COMMAND_MEMORY, ConfigSpace, reg};
use crate::{
    hypervisor::{Hypervisor, MappedSlot},
    memory::{AddressSpace, AddressSpaceError, Backing, IoHandler, SlotMapping},
};

/// Number of the expansion ROM of a function, beside its BARs.
pub const ROM_INDEX: usize = 6;

/// What a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Ports.
    Io,
    /// 32-bit memory.
    Memory32 {
        /// See `Memory64`.
        prefetchable: bool,
    },
    /// 64-bit memory; takes two registers.
    Memory64 {
        /// Whether reads have no side effects, which is what bridges may forward above 4 GiB.
        prefetchable: bool,
    },
    /// The expansion ROM: 32-bit memory with an enable bit of its own (PCI 3.0, 6.2.5.2).
    Rom,
}

/// Expansion ROM register: the ROM is decoded.
const ROM_ENABLE: u32 = 1;

impl BarKind {
    /// The smallest size that the register can express.
    pub fn min_size(self) -> u64 {
        match self {
            BarKind::Io => 4,
            BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => 16,
            BarKind::Rom => 1 << 11,
        }
    }

    /// The register's fixed low bits (PCI 3.0, 6.2.5.1).
    fn flags(self) -> u32 {
        match self {
            BarKind::Io => 0b01,
            BarKind::Rom => 0b0000,
            BarKind::Memory32 {
                prefetchable: false,
            } => 0b0000,
            BarKind::Memory32 { prefetchable: true } => 0b1000,
            BarKind::Memory64 {
                prefetchable: false,
            } => 0b0100,
            BarKind::Memory64 { prefetchable: true } => 0b1100,
        }
    }
}

/// A device behind a BAR that follows where it lies: doorbells move with it.
pub trait BarHandler: IoHandler {
    /// The BAR is decoded at an address from now on, or no longer.
    fn mapped(&self, address: Option<u64>);
}

/// What lies behind a BAR.
#[derive(Clone)]
pub enum BarContent {
    /// Registers that a device answers.
    Registers(Arc<dyn BarHandler>),
    /// Memory that the guest reaches without an exit, and registers around it.
    Memory {
        /// Answers what no range covers.
        handler: Arc<dyn BarHandler>,
        /// The memory, in order and not overlapping.
        ranges: Vec<BarMemory>,
        /// Shows the memory to the guest.
        hypervisor: Arc<dyn Hypervisor>,
    },
}

/// A part of a BAR that is memory.
#[derive(Clone, Debug)]
pub struct BarMemory {
    /// Bytes from the BAR's start, page aligned.
    pub offset: u64,
    /// Length in bytes, page aligned.
    pub len: u64,
    /// What it is.
    pub backing: Backing,
    /// Host-virtual address, valid for as long as the BAR exists.
    pub host: u64,
    /// Whether the guest may only read.
    pub readonly: bool,
}

/// The device's answers for a part of a BAR: offsets count from the BAR's start.
struct Part {
    handler: Arc<dyn BarHandler>,
    start: u64,
}

impl IoHandler for Part {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.handler.read(self.start + offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.handler.write(self.start + offset, data);
    }
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
    /// Where it is decoded, if it is.
    pub address: Option<u64>,
}

struct Bar {
    index: usize,
    kind: BarKind,
    size: u64,
    content: BarContent,
    /// Its regions in the address space, while it is decoded.
    mapped: Option<Mapped>,
}

/// A decoded BAR.
struct Mapped {
    /// Where it starts.
    address: u64,
    /// The regions that it consists of: start and length.
    regions: Vec<(u64, u64)>,
    slots: Vec<MappedSlot>,
}

/// The BARs of one function.
#[derive(Default)]
pub struct Bars {
    bars: Vec<Bar>,
    memory: Arc<AddressSpace>,
    ports: Arc<AddressSpace>,
    /// Whether the function is in a low-power state or in reset, and so decodes nothing.
    asleep: bool,
}

impl Bars {
    /// A function without BARs in the given maps.
    pub fn new(memory: Arc<AddressSpace>, ports: Arc<AddressSpace>) -> Self {
        Self {
            bars: Vec::new(),
            memory,
            ports,
            asleep: false,
        }
    }

    /// Adds the BAR of register `index` (0 to 5, or [`ROM_INDEX`]) to `config`.
    ///
    /// # Panics
    /// If `size` is not a power of two of at least 4 bytes of ports or 16 of memory: sizes are constants
    /// of each device, or checked before.
    pub fn add(
        &mut self,
        config: &mut ConfigSpace,
        index: usize,
        kind: BarKind,
        size: u64,
        content: BarContent,
    ) {
        assert!(
            size.is_power_of_two() && size >= kind.min_size(),
            "BAR {index} of {size:#x} bytes"
        );
        let register = register(index);
        let mask = !(size - 1);
        let enable = if kind == BarKind::Rom { ROM_ENABLE } else { 0 };
        config.set(register, &kind.flags().to_le_bytes());
        config.set_writable(register, &(mask as u32 | enable).to_le_bytes());
        if let BarKind::Memory64 { .. } = kind {
            config.set_writable(register + 4, &((mask >> 32) as u32).to_le_bytes());
        }
        self.bars.push(Bar {
            index,
            kind,
            size,
            content,
            mapped: None,
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
                address: bar.address(),
            })
            .collect()
    }

    /// Writes an address into the registers of BAR `index`.
    pub fn place(&mut self, config: &mut ConfigSpace, index: usize, address: u64) {
        let Some(bar) = self.bars.iter().find(|bar| bar.index == index) else {
            return;
        };
        let register = register(index);
        config.write(register, &(address as u32).to_le_bytes());
        if let BarKind::Memory64 { .. } = bar.kind {
            config.write(register + 4, &((address >> 32) as u32).to_le_bytes());
        }
    }

    /// Stops or resumes decoding, whatever the registers say. Takes effect with the next [`Bars::withdraw`] or
    /// [`Bars::update`].
    pub fn set_asleep(&mut self, asleep: bool) {
        self.asleep = asleep;
    }

    /// Where BAR `bar` is to be decoded.
    fn wanted(&self, bar: &Bar, config: &ConfigSpace) -> Option<u64> {
        bar.wanted(config).filter(|_| !self.asleep)
    }

    /// Removes what the registers no longer decode, and adds nothing. A device of the host needs this before it is
    /// written to.
    pub fn withdraw(&mut self, config: &ConfigSpace) {
        for index in 0..self.bars.len() {
            let wanted = self.wanted(&self.bars[index], config);
            if self.bars[index].address() != wanted {
                self.bars[index].unmap(&self.memory, &self.ports);
            }
        }
    }

    /// Makes the address spaces match the registers. Called after each write to COMMAND or a BAR.
    pub fn update(&mut self, config: &ConfigSpace) {
        // Removals first, so that two BARs can change places.
        self.withdraw(config);
        for index in 0..self.bars.len() {
            let wanted = self.wanted(&self.bars[index], config);
            if let (None, Some(address)) = (self.bars[index].address(), wanted) {
                self.bars[index].map(address, &self.memory, &self.ports);
            }
        }
    }
}

impl Drop for Bars {
    /// Notifies every device that its BARs are gone, and releases their memory slots.
    fn drop(&mut self) {
        for bar in &mut self.bars {
            bar.unmap(&self.memory, &self.ports);
        }
    }
}

/// The register of BAR `index`.
fn register(index: usize) -> usize {
    match index {
        ROM_INDEX => reg::EXPANSION_ROM,
        index => reg::BASE_ADDRESS_0 + index * 4,
    }
}

impl Bar {
    /// Where it is decoded now.
    fn address(&self) -> Option<u64> {
        self.mapped.as_ref().map(|mapped| mapped.address)
    }

    /// Where the registers place it, if it is decoded. All ones ask for the size, and 0 is a BAR without an
    /// address.
    fn wanted(&self, config: &ConfigSpace) -> Option<u64> {
        let register = register(self.index);
        let low = u64::from(config.u32(register));
        let max32 = u64::from(u32::MAX);
        let (enable, limit, address) = match self.kind {
            BarKind::Io => (COMMAND_IO, 0xffff, low & !3),
            BarKind::Memory32 { .. } => (COMMAND_MEMORY, max32, low & !0xf),
            BarKind::Memory64 { .. } => (
                COMMAND_MEMORY,
                u64::MAX,
                low & !0xf | u64::from(config.u32(register + 4)) << 32,
            ),
            BarKind::Rom if low & u64::from(ROM_ENABLE) == 0 => return None,
            BarKind::Rom => (COMMAND_MEMORY, max32, low & !0x7ff),
        };
        let last = address.checked_add(self.size - 1)?;
        let sizing = last == limit;
        (config.command() & enable != 0 && address != 0 && last <= limit && !sizing)
            .then_some(address)
    }

    fn handler(&self) -> &Arc<dyn BarHandler> {
        match &self.content {
            BarContent::Registers(handler) | BarContent::Memory { handler, .. } => handler,
        }
    }

    fn map(&mut self, address: u64, memory: &AddressSpace, ports: &AddressSpace) {
        let mut mapped = Mapped {
            address,
            regions: Vec::new(),
            slots: Vec::new(),
        };
        let space = self.space(memory, ports);
        match self.enter(&mut mapped, space) {
            Ok(()) => {
                self.mapped = Some(mapped);
                self.handler().mapped(Some(address));
            }
            // The guest put it over something else: nothing answers there, as on a real bus.
            Err(error) => {
                self.leave(mapped, space);
                tracing::warn!(%error, index = self.index, "the guest misplaced a BAR");
            }
        }
    }

    /// Inserts the memory ranges and the registers between them.
    fn enter(&self, mapped: &mut Mapped, space: &AddressSpace) -> Result<(), AddressSpaceError> {
        let mut end = 0;
        if let BarContent::Memory {
            ranges, hypervisor, ..
        } = &self.content
        {
            for range in ranges {
                let gpa = mapped.address + range.offset;
                let range_end = range.offset + range.len;
                self.enter_part(mapped, space, end..range.offset)?;
                space.insert_backed(gpa, range.len, range.backing.clone())?;
                mapped.regions.push((gpa, range.len));
                let slot = SlotMapping {
                    gpa,
                    len: range.len,
                    host: range.host,
                    readonly: range.readonly,
                };
                match hypervisor.map_slot(slot) {
                    Ok(slot) => mapped.slots.push(slot),
                    Err(error) => {
                        tracing::warn!(%error, index = self.index, "a BAR's memory is slow");
                        // The device answers each access instead.
                        mapped.regions.pop();
                        space.remove(gpa, range.len)?;
                        self.enter_part(mapped, space, range.offset..range_end)?;
                    }
                }
                end = range_end;
            }
        }
        self.enter_part(mapped, space, end..self.size)
    }

    fn enter_part(
        &self,
        mapped: &mut Mapped,
        space: &AddressSpace,
        range: Range<u64>,
    ) -> Result<(), AddressSpaceError> {
        if range.is_empty() {
            return Ok(());
        }
        let (gpa, len) = (mapped.address + range.start, range.end - range.start);
        let part = Part {
            handler: self.handler().clone(),
            start: range.start,
        };
        space.insert_io(gpa, len, Arc::new(part))?;
        mapped.regions.push((gpa, len));
        Ok(())
    }

    fn space<'a>(&self, memory: &'a AddressSpace, ports: &'a AddressSpace) -> &'a AddressSpace {
        match self.kind {
            BarKind::Io => ports,
            _ => memory,
        }
    }

    fn unmap(&mut self, memory: &AddressSpace, ports: &AddressSpace) {
        let Some(mapped) = self.mapped.take() else {
            return;
        };
        self.handler().mapped(None);
        self.leave(mapped, self.space(memory, ports));
    }

    fn leave(&self, mapped: Mapped, space: &AddressSpace) {
        // The guest loses the memory before the address space does: nothing else can be mapped there meanwhile.
        drop(mapped.slots);
        for (gpa, len) in mapped.regions {
            if let Err(error) = space.remove(gpa, len) {
                tracing::error!(%error, index = self.index, "a BAR was not where it should be");
            }
        }
    }
}

#[cfg(test)]
#[path = "bar_tests.rs"]
mod tests;
