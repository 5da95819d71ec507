//! Base address registers: placement, windows and withdrawal.

use crate::sync::Mutex;

use super::*;
use crate::{hypervisor::test_util::FakeHypervisor, memory::BackingKind, pci::Identity};

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
        self.0.lock().push(address);
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
        *s.device.0.lock(),
        [Some(0x1_2345_6000), None, Some(0x2_2345_6000), None]
    );
}

#[test]
fn sizing_while_decoding_maps_nothing_at_the_top() {
    let kind = BarKind::Memory32 { prefetchable: true };
    let mut s = setup(kind, 0x1000);
    s.config.write(reg::COMMAND, &[COMMAND_MEMORY as u8]);
    s.config.write(0x10, &[0xff; 4]);
    s.bars.update(&s.config);
    assert_eq!(s.config.u32(0x10), 0xffff_f008);
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
    assert!(s.device.0.lock().is_empty());
    s.bars.place(&mut s.config, 0, 0x20000);
    s.bars.update(&s.config);
    assert_eq!(*s.device.0.lock(), [Some(0x20000)]);
}

/// A BAR of 16 KiB whose second page is a file's fifth.
fn with_memory() -> (Setup, Arc<FakeHypervisor>) {
    let mut s = setup(MEMORY64, 0x1000);
    let hypervisor = Arc::new(FakeHypervisor::default());
    let backing = Backing {
        kind: BackingKind::Bar {
            device: 3,
            region: 2,
            start: 0,
        },
        file: Arc::new(tempfile::tempfile().unwrap()),
        offset: 0x4000,
    };
    let range = BarMemory {
        offset: 0x1000,
        len: 0x1000,
        backing,
        host: 0,
        readonly: false,
    };
    s.bars.add(
        &mut s.config,
        2,
        MEMORY64,
        0x4000,
        BarContent::Memory {
            handler: s.device.clone(),
            ranges: vec![range],
            hypervisor: hypervisor.clone(),
        },
    );
    s.bars.place(&mut s.config, 2, 0x10_0000);
    s.config.write(reg::COMMAND, &[COMMAND_MEMORY as u8]);
    s.bars.update(&s.config);
    (s, hypervisor)
}

#[test]
fn pieces_are_memory_and_the_rest_is_the_devices() {
    let (mut s, hypervisor) = with_memory();
    let segments = s.memory.resolve(0x10_1800, 0x800).unwrap();
    assert_eq!(segments[0].backing.offset, 0x4800);
    assert!(s.memory.resolve(0x10_1800, 0x801).is_err());
    assert_eq!(hypervisor.slots(), [(0x10_1000, 0x1000)]);
    let mut data = [0];
    s.memory.read(0x10_2034, &mut data);
    assert_eq!(data, [0x34]);
    s.bars.place(&mut s.config, 2, 0x20_0000);
    s.bars.update(&s.config);
    assert_eq!(hypervisor.slots(), [(0x20_1000, 0x1000)]);
    assert!(s.memory.resolve(0x20_1000, 0x1000).is_ok());
    drop(s.bars);
    assert!(hypervisor.slots().is_empty());
    assert!(s.memory.lookup(0x20_0000).is_none());
}

#[test]
fn what_is_half_misplaced_is_not_there_at_all() {
    let (mut s, hypervisor) = with_memory();
    let other = Arc::new(Device::default());
    s.memory.insert_io(0x30_3000, 0x1000, other).unwrap();
    s.bars.place(&mut s.config, 2, 0x30_0000);
    s.bars.update(&s.config);
    assert!(hypervisor.slots().is_empty());
    assert!(s.memory.lookup(0x30_1000).is_none());
}

#[test]
fn a_sleeping_function_decodes_nothing() {
    let (mut s, hypervisor) = with_memory();
    s.bars.set_asleep(true);
    s.bars.withdraw(&s.config);
    assert!(hypervisor.slots().is_empty());
    s.bars.update(&s.config);
    assert!(s.memory.lookup(0x10_0000).is_none());
    s.bars.set_asleep(false);
    s.bars.update(&s.config);
    assert_eq!(hypervisor.slots(), [(0x10_1000, 0x1000)]);
}

#[test]
fn the_rom_has_an_enable_bit_of_its_own() {
    let mut s = setup(MEMORY64, 0x1000);
    let content = BarContent::Registers(s.device.clone());
    s.bars
        .add(&mut s.config, ROM_INDEX, BarKind::Rom, 0x1_0000, content);
    s.config
        .write(reg::EXPANSION_ROM, &0xffff_f800u32.to_le_bytes());
    assert_eq!(s.config.u32(reg::EXPANSION_ROM), 0xffff_0000);
    s.bars.place(&mut s.config, ROM_INDEX, 0xc000_0000);
    s.config.write(reg::COMMAND, &[COMMAND_MEMORY as u8]);
    s.bars.update(&s.config);
    assert!(s.memory.lookup(0xc000_0000).is_none());
    s.config.write(reg::EXPANSION_ROM, &[1]);
    s.bars.update(&s.config);
    assert!(s.memory.lookup(0xc000_ffff).is_some());
}
