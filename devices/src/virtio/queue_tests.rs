//! Queues whose driver breaks the rules.

use std::{
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddress;

use super::*;
use crate::virtio::{
    QueueHandler, Worker,
    test_util::{Driver, INDIRECT, NEXT, QUEUE_SIZE, WRITE},
};

/// Gives every request back, and tells how long its buffers were.
struct Echo(DeviceQueue, mpsc::Sender<(u64, u64)>);

impl QueueHandler for Echo {
    fn sources(&self) -> Vec<RawFd> {
        vec![self.0.kick().as_raw_fd()]
    }

    fn ready(&mut self, _: usize) -> Result<(), QueueError> {
        self.0.clear_kick();
        let Self(queue, seen) = self;
        queue.drain(|_, request| {
            let _ = seen.send((request.readable.len(), request.writable.len()));
            Ok(0)
        })
    }
}

fn start(driver: &Driver) -> (Worker, mpsc::Receiver<(u64, u64)>) {
    let (sender, seen) = mpsc::channel();
    let queue = driver.activation().take_queue(0).unwrap();
    let worker = Worker::spawn("test", driver.status.clone(), Echo(queue, sender)).unwrap();
    (worker, seen)
}

fn breaks(descriptors: &[Descriptor], head: u16) {
    let driver = Driver::new(1);
    let (_worker, _seen) = start(&driver);
    driver.set_descriptors(0, descriptors);
    driver.kick(0, head);
    driver.wait_broken();
}

#[test]
fn buffers_arrive_in_order_and_by_direction() {
    let mut driver = Driver::new(1);
    let (_worker, seen) = start(&driver);
    driver.request(0, &[(0x10000, 7, 0), (0x20000, 0, 0), (0x30000, 9, WRITE)]);
    assert_eq!(seen.recv().unwrap(), (7, 9));
}

#[test]
fn an_indirect_table_is_one_request() {
    let driver = Driver::new(1);
    let (_worker, seen) = start(&driver);
    let mut table = Vec::new();
    for (len, flags, next) in [(4u32, NEXT, 1u16), (5, WRITE, 0)] {
        table.extend(0x10000u64.to_le_bytes());
        table.extend(len.to_le_bytes());
        table.extend(flags.to_le_bytes());
        table.extend(next.to_le_bytes());
    }
    driver.write(0x40000, &table);
    driver.set_descriptors(0, &[Descriptor::new(0x40000, 32, INDIRECT, 0)]);
    driver.kick(0, 0);
    assert_eq!(seen.recv().unwrap(), (4, 5));
}

#[test]
fn rule_breaks_end_the_device() {
    let ok = |flags, next| Descriptor::new(0x10000, 16, flags, next);
    // A loop.
    breaks(&[ok(NEXT, 1), ok(NEXT, 0)], 0);
    // An index outside of the table.
    breaks(&[ok(NEXT, QUEUE_SIZE)], 0);
    breaks(&[ok(0, 0)], QUEUE_SIZE);
    // Buffers outside of memory, at its end and around the end of the address space.
    breaks(&[Descriptor::new(1 << 40, 16, 0, 0)], 0);
    breaks(&[Descriptor::new((64 << 20) - 8, 16, 0, 0)], 0);
    breaks(&[Descriptor::new(u64::MAX - 4, 16, WRITE, 0)], 0);
    breaks(&[Descriptor::new(0x10000, u32::MAX, WRITE, 0)], 0);
    // Readable behind writable.
    breaks(&[ok(NEXT | WRITE, 1), ok(0, 0)], 0);
    // Indirect tables of no, bad and excessive length, outside of memory, and within another.
    breaks(&[Descriptor::new(0x40000, 0, INDIRECT, 0)], 0);
    breaks(&[Descriptor::new(0x40000, 17, INDIRECT, 0)], 0);
    breaks(&[Descriptor::new(0x40000, !15, INDIRECT, 0)], 0);
    breaks(&[Descriptor::new(1 << 40, 16, INDIRECT, 0)], 0);
}

#[test]
fn an_available_index_far_ahead_ends_the_device() {
    let driver = Driver::new(1);
    let (_worker, _seen) = start(&driver);
    driver.set_descriptors(0, &[Descriptor::new(0x10000, 16, 0, 0)]);
    driver.set_available_index(0, 0x8000);
    driver.kick(0, 0);
    driver.wait_broken();
}

#[test]
fn a_broken_device_stops_without_its_driver() {
    let driver = Driver::new(1);
    let (worker, seen) = start(&driver);
    driver.kick(0, QUEUE_SIZE);
    driver.wait_broken();
    driver.submit(0, &[(0x10000, 16, 0)]);
    drop(worker);
    assert!(seen.try_recv().is_err());
    assert_eq!(driver.used_index(0), 0);
}

/// Is busy for a while after each kick.
struct Busy {
    queue: DeviceQueue,
    started: mpsc::Sender<()>,
    finished: Arc<AtomicBool>,
}

impl QueueHandler for Busy {
    fn sources(&self) -> Vec<RawFd> {
        vec![self.queue.kick().as_raw_fd()]
    }

    fn ready(&mut self, _: usize) -> Result<(), QueueError> {
        self.queue.clear_kick();
        let _ = self.started.send(());
        thread::sleep(Duration::from_millis(200));
        self.finished.store(true, Ordering::Release);
        Ok(())
    }
}

#[test]
fn a_worker_that_is_dropped_no_longer_touches_memory() {
    let driver = Driver::new(1);
    let (started, starts) = mpsc::channel();
    let finished = Arc::new(AtomicBool::new(false));
    let busy = Busy {
        queue: driver.activation().take_queue(0).unwrap(),
        started,
        finished: finished.clone(),
    };
    let worker = Worker::spawn("test", driver.status.clone(), busy).unwrap();
    driver.kick(0, 0);
    starts.recv().unwrap();
    drop(worker);
    assert!(finished.load(Ordering::Acquire));
}

#[test]
fn taking_bytes_off_splits_spans() {
    let span = |address, len| Span {
        address: GuestAddress(address),
        len,
    };
    let mut buffers = Buffers(vec![span(0x1000, 10), span(0x2000, 10)]);
    let front = buffers.take_front(12);
    assert_eq!(front, Buffers(vec![span(0x1000, 10), span(0x2000, 2)]));
    assert_eq!(buffers, Buffers(vec![span(0x2002, 8)]));
    assert_eq!(buffers.take_front(100).len(), 8);
    assert!(buffers.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Whatever the table holds, the queue gives bounded requests or an error.
    #[test]
    fn any_descriptors_are_survived(
        table in prop::collection::vec((any::<u64>(), any::<u32>(), 0u16..8, 0u16..20), 16),
        near in any::<bool>(),
        heads in prop::collection::vec(0u16..18, 1..20),
    ) {
        let driver = Driver::new(1);
        let descriptors: Vec<_> = table
            .iter()
            .map(|&(address, len, flags, next)| {
                let (address, len) = if near { (address % (1 << 27), len % (1 << 20)) } else { (address, len) };
                Descriptor::new(address, len, flags, next)
            })
            .collect();
        driver.set_descriptors(0, &descriptors);
        for head in &heads {
            driver.kick(0, *head);
        }
        let mut queue = driver.activation().take_queue(0).unwrap();
        for _ in 0..=heads.len() {
            match queue.pop() {
                Ok(Some(request)) => {
                    prop_assert!(request.readable.len() + request.writable.len() <= 16 << 32);
                    request.readable.slices(queue.memory()).unwrap();
                    request.writable.slices(queue.memory()).unwrap();
                }
                Ok(None) => break,
                Err(_) => break,
            }
        }
    }
}
