//! Command streams of the GPU, through queues in memory. `stream_check` defines a stream and what must hold of it.
//! Besides, no descriptor may leak.

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
