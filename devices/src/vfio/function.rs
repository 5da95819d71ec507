//! A passed-through device as a PCI function of the machine.

use std::{
    ops::Range,
    os::fd::AsFd,
    sync::{Arc, MutexGuard, Weak},
};

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_ROM_REGION_INDEX,
};

use super::{
    config::{Consequences, MsixCapability, VirtualConfig},
    error::VfioError,
    host_device::HostDevice,
    interrupts::Interrupts,
    p2p::PeerMemory,
    regions::{RegionMapping, direct_parts},
};
use crate::{
    hypervisor::{AddedDevice, Hypervisor},
    memory::{Backing, BackingKind, IoHandler},
    pci::{
        BarContent, BarHandler, BarKind, BarMemory, BarReport, Bars, COMMAND_BUS_MASTER,
        CONFIG_SPACE_SIZE, FunctionContext, PBA_ENTRY, PciFunction, ROM_INDEX, TABLE_ENTRY, reg,
    },
    sync::Mutex,
    sys::vfio::RegionInfo,
};

/// BARs of a function.
const BARS: usize = 6;
/// The upper half of a 64-bit BAR has these low bits in the register below (PCI 3.0, 6.2.5.1).
const BAR_IO: u32 = 1;
const BAR_TYPE: u32 = 0b110;
const BAR_TYPE_64: u32 = 0b100;
const BAR_PREFETCHABLE: u32 = 0b1000;

/// What accesses of the guest change. BARs are dropped before interrupts: vectors must exist while BARs can be
/// reached.
struct State {
    bars: Bars,
    interrupts: Interrupts,
    config: VirtualConfig,
}

/// A passed-through function.
pub struct VfioFunction {
    state: Mutex<State>,
    device: Arc<HostDevice>,
    _added: Option<AddedDevice>,
}

/// The part of a BAR that the guest does not reach directly. The function owns its BARs, so this must not own the
/// function.
struct Registers {
    function: Weak<VfioFunction>,
    device: Arc<HostDevice>,
    region: RegionInfo,
    /// The MSI-X table and pending bits, as far as they are in this BAR.
    table: Range<u64>,
    pba: Range<u64>,
    peer: Option<PeerMemory>,
}

impl VfioFunction {
    /// Resets `device` and makes a function of it. `number` is the number of the device in the machine.
    pub fn new(
        device: Arc<HostDevice>,
        number: u32,
        environment: &FunctionContext,
    ) -> Result<Arc<Self>, VfioError> {
        let address = device.address;
        if let Err(error) = device.reset() {
            tracing::info!(%error, %address, "the device cannot be reset: it starts as it is");
        }
        let mut bytes = Box::new([0; CONFIG_SPACE_SIZE]);
        let size = device.region(VFIO_PCI_CONFIG_REGION_INDEX).size as usize;
        let len = size.min(CONFIG_SPACE_SIZE);
        let broken = |what: String| VfioError::Broken { address, what };
        device
            .read(VFIO_PCI_CONFIG_REGION_INDEX, 0, &mut bytes[..len])
            .map_err(|error| broken(format!("its configuration space cannot be read ({error})")))?;
        device
            .write(VFIO_PCI_CONFIG_REGION_INDEX, reg::COMMAND as u64, &[0; 2])
            .map_err(|error| broken(format!("its COMMAND cannot be written ({error})")))?;
        let kinds = bar_kinds(&bytes);
        let (pins, _) = device.interrupts(VFIO_PCI_INTX_IRQ_INDEX);
        let mut config = VirtualConfig::new(bytes, pins != 0);
        let hypervisor = &environment.hypervisor;
        let vectors = config.msix.map(|msix| msix.count);
        let interrupts = Interrupts::new(device.clone(), &**hypervisor, vectors)?;
        let added = match hypervisor.add_vfio_device(device.file().as_fd()) {
            Ok(added) => Some(added),
            Err(error) => {
                tracing::warn!(%error, %address, "KVM does not take note of the device");
                None
            }
        };
        let mut bars = Bars::new(environment.memory.clone(), environment.ports.clone());
        let mut failed = None;
        let function = Arc::new_cyclic(|this: &Weak<Self>| {
            let rom = [(ROM_INDEX, BarKind::Rom)];
            for (index, kind) in kinds.into_iter().chain(rom) {
                let region = device.region(index as u32);
                if region.size == 0 {
                    continue;
                }
                if !region.size.is_power_of_two() || region.size < kind.min_size() {
                    let what = format!("its BAR {index} has {:#x} bytes", region.size);
                    failed = Some(broken(what));
                    break;
                }
                let size = region.size;
                match content(this, &device, region, config.msix, number, hypervisor) {
                    Ok(content) => bars.add(&mut config.space, index, kind, size, content),
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                }
            }
            Self {
                state: Mutex::new(State {
                    bars,
                    interrupts,
                    config,
                }),
                device,
                _added: added,
            }
        });
        if let Some(error) = failed {
            return Err(error);
        }
        function.lock().config.keep();
        Ok(function)
    }

    /// Its BARs now.
    pub fn report(&self) -> Vec<BarReport> {
        self.lock().bars.report()
    }

    /// Whether a driver has enabled DMA (bus mastering).
    pub fn is_enabled(&self) -> bool {
        self.lock().config.space.command() & COMMAND_BUS_MASTER != 0
    }

    /// The pin that the function interrupts with, 0 for INTA; none if it has no use for one.
    pub fn interrupt_pin(&self) -> Option<u8> {
        self.lock().config.interrupt_pin()
    }

    /// Connects the pin to line `gsi`. For the machine, before the guest runs.
    pub fn connect_pin(&self, hypervisor: &dyn Hypervisor, gsi: u32) {
        let State {
            interrupts, config, ..
        } = &mut *self.lock();
        let connected = hypervisor
            .level_irq(gsi)
            .and_then(|line| interrupts.connect_intx(line));
        if let Err(error) = connected {
            // Virtual functions report pins that they lack; the specification wants no pin.
            tracing::info!(%error, address = %self.device.address, "the device has no INTx");
            config.remove_pin();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Stops decoding and DMA.
    fn stop(&self) {
        let command = reg::COMMAND as u64;
        if let Err(error) = self
            .device
            .write(VFIO_PCI_CONFIG_REGION_INDEX, command, &[0; 2])
        {
            tracing::warn!(%error, device = %self.device.address, "cannot stop the device's DMA");
        }
    }

    fn forward(&self, writes: &[(usize, Vec<u8>)]) {
        for (offset, bytes) in writes {
            let result = self
                .device
                .write(VFIO_PCI_CONFIG_REGION_INDEX, *offset as u64, bytes);
            if let Err(error) = result {
                tracing::debug!(%error, offset, device = %self.device.address, "a configuration write is lost");
            }
        }
    }
}

/// Kinds of the BARs that there are, by the device's registers.
fn bar_kinds(config: &[u8; CONFIG_SPACE_SIZE]) -> Vec<(usize, BarKind)> {
    let mut kinds = Vec::new();
    let mut index = 0;
    while index < BARS {
        let at = reg::BASE_ADDRESS_0 + index * 4;
        let value = u32::from(config[at]);
        let prefetchable = value & BAR_PREFETCHABLE != 0;
        let kind = if value & BAR_IO != 0 {
            BarKind::Io
        } else if value & BAR_TYPE == BAR_TYPE_64 && index + 1 < BARS {
            BarKind::Memory64 { prefetchable }
        } else {
            BarKind::Memory32 { prefetchable }
        };
        kinds.push((index, kind));
        index += if matches!(kind, BarKind::Memory64 { .. }) {
            2
        } else {
            1
        };
    }
    kinds
}

/// What lies behind a BAR: the device's memory where it can be mapped, its registers elsewhere.
fn content(
    function: &Weak<VfioFunction>,
    device: &Arc<HostDevice>,
    region: RegionInfo,
    msix: Option<MsixCapability>,
    number: u32,
    hypervisor: &Arc<dyn Hypervisor>,
) -> Result<BarContent, VfioError> {
    let (table, pba) = msix.map_or((0..0, 0..0), |msix| msix_ranges(msix, region.index));
    let trapped: Vec<_> = [&table, &pba]
        .into_iter()
        .filter(|range| !range.is_empty())
        .cloned()
        .collect();
    let parts = direct_parts(&region, &trapped);
    let mut registers = Registers {
        function: function.clone(),
        device: device.clone(),
        table,
        pba,
        peer: None,
        region,
    };
    if parts.is_empty() {
        return Ok(BarContent::Registers(Arc::new(registers)));
    }
    let region = &registers.region;
    let mapping =
        RegionMapping::new(device.file(), region, &parts).map_err(|source| VfioError::Host {
            action: "map the device's memory",
            source,
        })?;
    let mapping = Arc::new(mapping);
    let ranges = parts
        .iter()
        .map(|part| BarMemory {
            offset: part.start,
            len: part.end - part.start,
            backing: Backing {
                kind: BackingKind::Bar {
                    device: number,
                    region: region.index,
                    start: region.start,
                },
                file: device.file().clone(),
                offset: region.start + part.start,
            },
            host: mapping.host(part.start).expose_provenance() as u64,
            readonly: !region.writable,
        })
        .collect();
    let index = region.index;
    registers.peer = Some(PeerMemory::new(device.clone(), index, &parts, mapping));
    Ok(BarContent::Memory {
        handler: Arc::new(registers),
        ranges,
        hypervisor: hypervisor.clone(),
    })
}

/// Where the MSI-X table and the pending bits are in BAR `bar`.
fn msix_ranges(msix: MsixCapability, bar: u32) -> (Range<u64>, Range<u64>) {
    let range = |(in_bar, start): (u32, u64), len| {
        if in_bar == bar {
            start..start + len
        } else {
            0..0
        }
    };
    let count = u64::from(msix.count);
    (
        range(msix.table, count * TABLE_ENTRY),
        range(msix.pba, count.div_ceil(64) * PBA_ENTRY),
    )
}

impl PciFunction for VfioFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let state = self.lock();
        let read = self
            .device
            .read(VFIO_PCI_CONFIG_REGION_INDEX, offset.into(), data);
        if read.is_err() {
            // As a function without that register, or one that is gone, would answer.
            data.fill(if offset < 0x100 { 0xff } else { 0 });
        }
        state.config.overlay(offset.into(), data);
    }

    /// What removes memory is applied before the device is written to, and what adds memory afterwards. The guest
    /// would otherwise reach into memory that is off, and KVM reports that as an error.
    fn write_config(&self, offset: u16, data: &[u8]) {
        let state = &mut *self.lock();
        let Consequences {
            forward,
            resets,
            msi,
            msix,
        } = state.config.write(offset.into(), data);
        state.bars.set_asleep(resets || state.config.asleep());
        state.bars.withdraw(&state.config.space);
        self.forward(&forward);
        state.bars.set_asleep(state.config.asleep());
        state.bars.update(&state.config.space);
        if msi && let Some(setting) = state.config.msi() {
            state.interrupts.update_msi(setting);
        }
        if let Some(control) = msix {
            if let Some(table) = &mut state.interrupts.msix {
                table.set_control(control);
            }
            state.interrupts.update_msix();
        }
    }

    fn bars(&self) -> Vec<(usize, BarKind, u64)> {
        self.lock().bars.list()
    }

    fn place_bar(&self, index: usize, address: u64) {
        let State { bars, config, .. } = &mut *self.lock();
        bars.place(&mut config.space, index, address);
        bars.update(&config.space);
    }

    fn reset(&self) {
        let state = &mut *self.lock();
        state.config.reset();
        state.bars.update(&state.config.space);
        state.interrupts.reset();
        self.stop();
        if let Err(error) = self.device.reset() {
            tracing::info!(%error, address = %self.device.address, "the device cannot be reset");
        }
    }
}

impl IoHandler for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let function = || self.function.upgrade();
        if self.table.contains(&offset) {
            if let Some(function) = function()
                && let Some(msix) = &function.lock().interrupts.msix
            {
                msix.read_table(offset - self.table.start, data);
            }
        } else if self.pba.contains(&offset) {
            if let Some(function) = function()
                && let Some(msix) = &function.lock().interrupts.msix
            {
                msix.read_pba(offset - self.pba.start, data);
            }
        } else if self.device.read(self.region.index, offset, data).is_err() {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if self.table.contains(&offset) {
            if let Some(function) = self.function.upgrade() {
                let interrupts = &mut function.lock().interrupts;
                if let Some(msix) = &mut interrupts.msix {
                    msix.write_table(offset - self.table.start, data);
                }
                interrupts.update_msix();
            }
        } else if !self.pba.contains(&offset)
            && self.region.index != VFIO_PCI_ROM_REGION_INDEX
            && let Err(error) = self.device.write(self.region.index, offset, data)
        {
            tracing::debug!(%error, offset, device = %self.device.address, "a write is lost");
        }
    }
}

impl BarHandler for Registers {
    /// Called with the state of the function locked: touches only the BAR itself.
    fn mapped(&self, address: Option<u64>) {
        if let Some(peer) = &self.peer {
            peer.moved(address);
        }
    }
}

impl Drop for VfioFunction {
    /// Ends all DMA to this machine: the memory of the next one may lie at the same addresses.
    fn drop(&mut self) {
        let state = self.state.get_mut();
        state.bars.set_asleep(true);
        state.bars.withdraw(&state.config.space);
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_follow_the_registers() {
        let mut config = [0; CONFIG_SPACE_SIZE];
        config[0x10] = 0x0c;
        config[0x18] = 0x01;
        config[0x1c] = 0x04;
        config[0x24] = 0x0c;
        let wide = |prefetchable| BarKind::Memory64 { prefetchable };
        let narrow = |prefetchable| BarKind::Memory32 { prefetchable };
        let kinds = [
            (0, wide(true)),
            (2, BarKind::Io),
            (3, wide(false)),
            (5, narrow(true)),
        ];
        assert_eq!(bar_kinds(&config), kinds);
        assert_eq!(bar_kinds(&[0; CONFIG_SPACE_SIZE])[5], (5, narrow(false)));
    }

    #[test]
    fn table_and_pending_bits_are_where_the_capability_says() {
        let msix = MsixCapability {
            at: 0x50,
            count: 65,
            table: (3, 0x1000),
            pba: (2, 0x800),
        };
        assert_eq!(msix_ranges(msix, 3), (0x1000..0x1410, 0..0));
        assert_eq!(msix_ranges(msix, 2), (0..0, 0x800..0x810));
    }
}
