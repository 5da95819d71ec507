//! The GPU's command stream, behind queues in memory. The input is a list of requests, each with two bytes in
//! front: the queue with how the request is cut into descriptors, and its length.
//!
//! Whatever it is: each request is answered, the guest holds no more than it may, and after a reset neither
//! memory nor a descriptor is left.

#![no_main]

use std::sync::{Arc, LazyLock};

use fanlight_devices::{
    dmabuf::Exporter,
    memory::{AddressSpace, GuestRam},
    virtio::{
        VirtioDevice,
        gpu::{DisplayConfig, DisplayHandle, Gpu, Mode, OUTPUTS},
        test_util::{Driver, WRITE},
    },
};
use libfuzzer_sys::fuzz_target;

const MEMORY: u64 = 64 << 20;
const BUDGET: u64 = 16 << 20;
const REQUEST: u64 = 0x10_0000;
const RESPONSE: u64 = 0x20_0000;
/// Every feature that the device offers.
const FEATURES: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5;

static RAM: LazyLock<(GuestRam, Arc<AddressSpace>)> = LazyLock::new(|| {
    let ram = GuestRam::new(MEMORY, None).unwrap();
    let map = Arc::new(AddressSpace::new());
    ram.insert_into(&map).unwrap();
    (ram, map)
});

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn run(mut data: &[u8]) {
    let (ram, map) = &*RAM;
    let config = DisplayConfig {
        outputs: vec![Mode {
            width: 640,
            height: 480,
        }],
        name: "Fuzz".into(),
        max_resource_memory: BUDGET,
    };
    let display = DisplayHandle::new(config, Arc::new(Exporter::open())).unwrap();
    let watcher = display.subscribe(false).unwrap();
    let mut gpu = Gpu::new(display.clone(), map.clone());
    let mut driver = Driver::with_memory(2, ram.memory().clone());
    gpu.activate(driver.activation_with(FEATURES)).unwrap();
    while let [how, len, rest @ ..] = data {
        let (request, rest) = rest.split_at(usize::from(*len).min(rest.len()));
        data = rest;
        driver.write(REQUEST, request);
        let cut = (usize::from(how >> 1) % 64).min(request.len()) as u32;
        let rest = request.len() as u32 - cut;
        let chain = [
            (REQUEST, cut, 0),
            (REQUEST + u64::from(cut), rest, 0),
            (RESPONSE, 4096, WRITE),
        ];
        let written = driver.request(usize::from(how & 1), &chain);
        assert!(written >= 24);
        assert!(display.statistics().resource_memory <= BUDGET);
    }
    for output in 0..OUTPUTS {
        let _ = display.read_scanout(output);
        let _ = display.export_scanout(output);
    }
    drop(watcher.events());
    assert!(!driver.status.needs_reset());
    gpu.reset();
    assert_eq!(display.statistics().resource_memory, 0);
}

fuzz_target!(|data: &[u8]| {
    LazyLock::force(&RAM);
    let before = open_descriptors();
    run(data);
    assert_eq!(open_descriptors(), before);
});
