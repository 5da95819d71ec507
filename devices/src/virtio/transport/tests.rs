//! The transport under drivers that follow the rules, and drivers that break them.

use std::sync::Arc;

use proptest::prelude::*;
use virtio_queue::QueueT;

use super::{layout::*, *};
use crate::{
    pci::{DevFn, FunctionContext, PciBus, PciFunction},
    sync::Mutex,
    virtio::{ActivateError, Activation, VirtioDevice, test_util::environment},
};

/// A device that records its activations.
#[derive(Clone, Debug, Default)]
struct Probe(Arc<Mutex<Vec<Activation>>>);

impl VirtioDevice for Probe {
    fn device_id(&self) -> u32 {
        4
    }
    fn name(&self) -> &'static str {
        "probe"
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }
    fn features(&self) -> u64 {
        0b101
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::super::read_bytes(b"config", offset, data);
    }
    fn write_config(&mut self, _: u64, _: &[u8]) {}
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.0.lock().push(activation);
        Ok(())
    }
    fn reset(&mut self) {
        self.0.lock().clear();
    }
}

/// A device with shared memory.
#[derive(Debug)]
struct Sharing(Arc<dyn crate::hypervisor::Hypervisor>);

impl VirtioDevice for Sharing {
    fn device_id(&self) -> u32 {
        16
    }
    fn name(&self) -> &'static str {
        "sharing"
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }
    fn features(&self) -> u64 {
        0
    }
    fn read_config(&self, _: u64, _: &mut [u8]) {}
    fn write_config(&mut self, _: u64, _: &[u8]) {}
    fn shared_memory(&self) -> Option<SharedMemory> {
        use crate::virtio::gpu::render::HostMemory;
        let memory = HostMemory::new(8 << 30, false, self.0.clone(), Arc::default()).unwrap();
        Some(memory.shared_memory().unwrap())
    }
    fn activate(&mut self, _: Activation) -> Result<(), ActivateError> {
        Ok(())
    }
    fn reset(&mut self) {}
}

#[test]
fn shared_memory_has_a_bar_and_a_capability() {
    let (environment, hypervisor) = environment();
    let device = Box::new(Sharing(hypervisor.clone()));
    let function = VirtioPciFunction::new(device, 0x038000, &environment).unwrap();
    assert_eq!(function.bars().len(), 2);
    function.place_bar(2, 0x8_0000_0000);
    function.write_config(4, &[2, 0]);
    assert_eq!(hypervisor.slots(), [(0x8_0000_0000, 8 << 30)]);
    let resolved = environment.memory.resolve(0x8_0000_1000, 0x1000).unwrap();
    assert!(matches!(
        resolved[0].backing.kind,
        crate::memory::BackingKind::SharedMemory { id: 1, .. }
    ));
    // struct virtio_pci_cap64, by its type.
    let read = |at: u8, len: usize| {
        let mut bytes = vec![0; len];
        for (index, byte) in bytes.iter_mut().enumerate() {
            function.read_config(u16::from(at) + index as u16, std::slice::from_mut(byte));
        }
        bytes
    };
    let mut at = read(0x34, 1)[0];
    let cap = loop {
        assert_ne!(at, 0, "no capability");
        let cap = read(at, 24);
        if cap[0] == 9 && cap[3] == 8 {
            break cap;
        }
        at = cap[1];
    };
    assert_eq!(cap[2..8], [24, 8, 2, 1, 0, 0]);
    assert_eq!(cap[8..], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
}

const BAR_AT: u64 = 0xc000_0000;

struct Setup {
    probe: Probe,
    function: Arc<VirtioPciFunction>,
    environment: FunctionContext,
    hypervisor: Arc<crate::hypervisor::test_util::FakeHypervisor>,
}

fn setup() -> Setup {
    let (environment, hypervisor) = environment();
    let probe = Probe::default();
    let function = VirtioPciFunction::new(Box::new(probe.clone()), 0xff0000, &environment).unwrap();
    function.place_bar(0, BAR_AT);
    function.write_config(4, &[2, 0]);
    Setup {
        probe,
        function,
        environment,
        hypervisor,
    }
}

impl Setup {
    fn write(&self, offset: u64, data: &[u8]) {
        self.environment.memory.write(BAR_AT + offset, data);
    }

    fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.environment.memory.read(BAR_AT + offset, &mut data);
        data
    }

    fn status(&self) -> u8 {
        self.read::<1>(0x14)[0]
    }

    /// Accepts the given features and sets FEATURES_OK. Returns whether the device accepted.
    fn negotiate(&self, features: u64) -> bool {
        self.write(0x14, &[3]);
        for (select, half) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            self.write(0x08, &select.to_le_bytes());
            self.write(0x0c, &half.to_le_bytes());
        }
        self.write(0x14, &[0xb]);
        self.status() & STATUS_FEATURES_OK != 0
    }

    fn set_queue(&self, index: u16, size: u16, [desc, driver, device]: [u64; 3]) {
        self.write(0x16, &index.to_le_bytes());
        self.write(0x18, &size.to_le_bytes());
        self.write(0x1a, &(index + 1).to_le_bytes());
        self.write(0x20, &desc.to_le_bytes());
        self.write(0x28, &(driver as u32).to_le_bytes());
        self.write(0x2c, &((driver >> 32) as u32).to_le_bytes());
        self.write(0x30, &device.to_le_bytes());
        self.write(0x1c, &[1, 0]);
    }

    fn is_active(&self) -> bool {
        !self.probe.0.lock().is_empty()
    }
}

const RINGS: [u64; 3] = [0x1000, 0x2000, 0x3000];

#[test]
fn a_driver_that_follows_the_rules_gets_its_device() {
    let s = setup();
    assert!(s.negotiate(VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | 1));
    s.set_queue(0, 16, RINGS);
    s.write(0x14, &[0xf]);
    let active = s.probe.0.lock();
    let queue = active[0].queues[0].as_ref().unwrap();
    assert_eq!(queue.queue.size(), 16);
    assert_eq!(queue.queue.avail_ring(), 0x2000);
    assert!(queue.vector.is_some());
    assert!(active[0].queues[1].is_none());
    assert_eq!(active[0].features & 0b101, 1);
    drop(active);
    assert_eq!(s.status(), 0xf);
    s.write(0x14, &[0]);
    assert!(!s.is_active());
    assert_eq!(s.read::<2>(0x18), 64u16.to_le_bytes());
    assert!(
        s.negotiate(VIRTIO_F_VERSION_1),
        "a second driver starts over"
    );
}

#[test]
fn features_that_are_not_offered_are_refused() {
    for features in [1, VIRTIO_F_VERSION_1 | 2, VIRTIO_F_VERSION_1 | 1 << 40] {
        assert!(!setup().negotiate(features), "{features:#x}");
    }
}

#[test]
fn bad_queues_break_the_device_and_a_reset_mends_it() {
    for (size, rings) in [
        (0, RINGS),
        (3, RINGS),
        (128, RINGS),
        (0x8000, RINGS),
        (16, [0x1001, 0x2000, 0x3000]),
        (16, [0x1000, 0x2001, 0x3000]),
        (16, [1 << 40, 0x2000, 0x3000]),
        (16, [0x1000, (64 << 20) - 4, 0x3000]),
        (16, [!15, 0x2000, 0x3000]),
    ] {
        let s = setup();
        assert!(s.negotiate(VIRTIO_F_VERSION_1));
        s.set_queue(0, size, rings);
        s.write(0x14, &[0xf]);
        assert_eq!(s.status() & 0x40, 0x40, "{size} {rings:x?}");
        assert!(!s.is_active());
        s.write(0x14, &[0]);
        assert_eq!(s.status(), 0);
    }
}

#[test]
fn driver_ok_without_features_ok_does_not_start() {
    let s = setup();
    s.set_queue(0, 16, RINGS);
    s.write(0x14, &[7]);
    assert!(!s.is_active());
    assert_eq!(s.status() & 0x40, 0x40);
}

#[test]
fn vectors_and_queues_out_of_range_read_back_as_none() {
    let s = setup();
    s.write(0x10, &3u16.to_le_bytes());
    assert_eq!(s.read::<2>(0x10), [0xff, 0xff]);
    s.write(0x10, &2u16.to_le_bytes());
    assert_eq!(s.read::<2>(0x10), [2, 0]);
    s.write(0x16, &9u16.to_le_bytes());
    assert_eq!(s.read::<2>(0x18), [0, 0]);
    s.write(0x18, &16u16.to_le_bytes());
    s.write(0x1c, &[1, 0]);
    assert_eq!(s.read::<2>(0x1c), [0, 0]);
}

#[test]
fn doorbells_move_with_the_bar() {
    let s = setup();
    let at = |base: u64| vec![base + NOTIFY, base + NOTIFY + 4];
    assert_eq!(*s.hypervisor.doorbells.lock(), at(BAR_AT));
    s.function.write_config(0x10, &0xd000_0000u32.to_le_bytes());
    assert_eq!(*s.hypervisor.doorbells.lock(), at(0xd000_0000));
    s.function.write_config(4, &[0, 0]);
    assert!(s.hypervisor.doorbells.lock().is_empty());
}

#[test]
fn the_configuration_window_reaches_the_bar() {
    let s = setup();
    let at = s.function.lock().pci_cfg_at as u16;
    let config = |offset: u16, value: u32| {
        s.function.write_config(at + offset, &value.to_le_bytes());
    };
    config(CAP_BAR as u16, 0);
    config(CAP_OFFSET as u16, DEVICE as u32);
    config(CAP_LENGTH as u16, 4);
    let mut data = [0; 4];
    s.function
        .read_config(at + CAP_PCI_CFG_DATA as u16, &mut data);
    assert_eq!(&data, b"conf");
    config(CAP_OFFSET as u16, !3);
    s.function
        .read_config(at + CAP_PCI_CFG_DATA as u16, &mut data);
    assert_ne!(&data, b"conf");
}

#[test]
fn a_function_that_is_dropped_takes_its_device_along() {
    let s = setup();
    let bus = PciBus::default();
    bus.add(s.function.clone()).unwrap();
    let mut id = [0; 4];
    bus.read_config(0, DevFn::new(0, 0), 0, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x1044_1af4);
    assert!(s.negotiate(VIRTIO_F_VERSION_1));
    s.set_queue(0, 16, RINGS);
    s.write(0x14, &[0xf]);
    assert!(s.is_active());
    let probe = s.probe.clone();
    drop((bus, s));
    assert!(probe.0.lock().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    /// Any writes of any width at any offset neither panic nor hang.
    #[test]
    fn any_accesses_are_survived(
        accesses in prop::collection::vec(
            (0u64..0x8000, prop::collection::vec(any::<u8>(), 1..9), any::<bool>(), any::<bool>()), 1..80),
    ) {
        let s = setup();
        for (offset, data, near, configuration) in accesses {
            let offset = if near { offset % 0x40 } else { offset };
            let mut back = data.clone();
            if configuration {
                s.function.write_config(offset as u16 % 4096, &data[..data.len().min(4)]);
                s.function.read_config(offset as u16 % 4096, &mut back);
            } else {
                s.write(offset, &data);
                s.environment.memory.read(BAR_AT + offset, &mut back);
            }
        }
    }
}
