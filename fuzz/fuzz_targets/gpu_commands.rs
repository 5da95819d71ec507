//! The GPU's command stream, behind queues in memory: what a stream is and what must hold of it is said in
//! `stream_check`. Besides, no descriptor may be left.

#![no_main]

use std::sync::Once;

use fanlight_devices::virtio::gpu::stream_check::check;
use libfuzzer_sys::fuzz_target;

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// What is made once is made before anything is counted.
static FIRST: Once = Once::new();

fuzz_target!(|data: &[u8]| {
    FIRST.call_once(|| check(&[]));
    let before = open_descriptors();
    check(data);
    assert_eq!(open_descriptors(), before);
});
