//! Watchers that hold fences back.

use std::{os::fd::AsRawFd, time::Instant};

use super::*;

#[test]
fn a_pacing_watcher_delays_fences_but_not_for_long() {
    let mut machine = machine();
    machine.create_blob(1, 0x4000, &[(PIXELS, 0x4000)]);
    let whole = rect(0, 0, 64, 64);
    let command = scanout_blob(0, 1, (64, 64), whole);
    machine.ok(VIRTIO_GPU_CMD_SET_SCANOUT_BLOB, &command);
    let watcher = machine.display.subscribe(true).unwrap();
    watcher.events();
    let flush = ResourceFlush {
        r: whole,
        resource_id: 1.into(),
        padding: 0.into(),
    };
    let submit = |machine: &Machine, fence| {
        let header = header(VIRTIO_GPU_CMD_RESOURCE_FLUSH, Some(fence));
        let len = machine.prepare(header, flush.as_bytes());
        let before = machine.driver.used_index(0);
        let chain = [(REQUEST, len, 0), (RESPONSE, 64, WRITE)];
        machine.driver.submit(0, &chain);
        before
    };
    let damage = |watcher: &DisplaySubscriber| {
        let events = watcher.events();
        events.iter().find_map(|event| match event {
            DisplayEvent::Damage { serial, .. } => Some(*serial),
            _ => None,
        })
    };
    let before = submit(&machine, 1);
    // Once the watcher knows of the frame, its fence is held.
    machine.driver.wait(|_| watcher.has_news());
    watcher.release(damage(&watcher).unwrap());
    machine
        .driver
        .wait(|driver| driver.used_index(0) == before.wrapping_add(1));

    // One that never releases: this fence waits, the next one does not.
    let start = Instant::now();
    let before = submit(&machine, 2);
    machine
        .driver
        .wait(|driver| driver.used_index(0) == before.wrapping_add(1));
    assert!(start.elapsed() >= MAX_FENCE_DELAY);
    let before = submit(&machine, 3);
    machine
        .driver
        .wait(|driver| driver.used_index(0) == before.wrapping_add(1));
}

impl DisplaySubscriber {
    fn has_news(&self) -> bool {
        let mut fds = [libc::pollfd {
            fd: rustix::fd::AsFd::as_fd(self).as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        }];
        // SAFETY: `fds` is one `pollfd`, as the call says.
        unsafe { libc::poll(fds.as_mut_ptr(), 1, 0) == 1 }
    }
}
