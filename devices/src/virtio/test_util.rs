//! A driver for unit tests: queues in memory, requests made of raw descriptors.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use virtio_queue::{
    QueueT,
    desc::{RawDescriptor, split::Descriptor},
    mock::MockSplitQueue,
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Activation, ActiveQueue, DeviceStatus};
use crate::{
    GuestMemory,
    hypervisor::{Hypervisor, test_util::FakeHypervisor},
};

/// Descriptor flags (Virtio 1.3, 2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Size of each queue.
pub const QUEUE_SIZE: u16 = 16;
const MEMORY: usize = 64 << 20;
/// Queues lie below this address; tests use what is above.
const QUEUE_SPACE: u64 = 0x4000;
const PATIENCE: Duration = Duration::from_secs(10);

/// The driver's side of some queues.
pub struct Driver {
    pub mem: GuestMemory,
    pub status: DeviceStatus,
    kicks: Vec<EventFd>,
    hypervisor: FakeHypervisor,
}

impl Driver {
    pub fn new(queues: usize) -> Self {
        Self {
            mem: GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap(),
            status: DeviceStatus::new(),
            kicks: (0..queues)
                .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
                .collect(),
            hypervisor: FakeHypervisor::default(),
        }
    }

    fn queue(&self, index: usize) -> MockSplitQueue<'_, GuestMemory> {
        let start = GuestAddress(0x1000 + index as u64 * QUEUE_SPACE);
        MockSplitQueue::create(&self.mem, start, QUEUE_SIZE)
    }

    pub fn activation(&self) -> Activation {
        self.activation_with(0)
    }

    pub fn activation_with(&self, features: u64) -> Activation {
        let queues = self.kicks.iter().enumerate().map(|(index, kick)| {
            let mut queue: virtio_queue::Queue = self.queue(index).create_queue().unwrap();
            queue.set_ready(true);
            Some(ActiveQueue {
                index: index as u16,
                queue,
                kick: kick.try_clone().unwrap(),
                vector: Some(self.hypervisor.msi_vector().unwrap()),
            })
        });
        Activation {
            mem: self.mem.clone(),
            features,
            queues: queues.collect(),
            status: self.status.clone(),
        }
    }

    /// Writes descriptors from index 0 on, as they are.
    pub fn set_descriptors(&self, queue: usize, descriptors: &[Descriptor]) {
        let table = self.queue(queue);
        for (index, descriptor) in (0..).zip(descriptors) {
            table
                .desc_table()
                .store(index, RawDescriptor::from(*descriptor))
                .unwrap();
        }
    }

    /// Makes descriptor `head` available and kicks.
    pub fn kick(&self, queue: usize, head: u16) {
        let rings = self.queue(queue);
        let idx = u16::from_le(rings.avail().idx().load());
        let ring = rings.avail().ring();
        ring.ref_at(usize::from(idx % QUEUE_SIZE))
            .unwrap()
            .store(head.to_le());
        rings.avail().idx().store((idx.wrapping_add(1)).to_le());
        self.kicks[queue].write(1).unwrap();
    }

    pub fn used_index(&self, queue: usize) -> u16 {
        u16::from_le(self.queue(queue).used().idx().load())
    }

    /// Submits a chain of (address, length, flags) and waits for it; the used length.
    pub fn request(&mut self, queue: usize, chain: &[(u64, u32, u16)]) -> u32 {
        let before = self.used_index(queue);
        self.submit(queue, chain);
        self.wait(|driver| driver.used_index(queue) != before);
        let rings = self.queue(queue);
        let used = rings.used().ring();
        used.ref_at(usize::from(before % QUEUE_SIZE))
            .unwrap()
            .load()
            .len()
    }

    /// Submits a chain and does not wait.
    pub fn submit(&self, queue: usize, chain: &[(u64, u32, u16)]) {
        let last = chain.len() - 1;
        let descriptors: Vec<_> = (0u16..)
            .zip(chain)
            .map(|(index, &(address, len, flags))| {
                let next = if usize::from(index) == last { 0 } else { NEXT };
                Descriptor::new(address, len, flags | next, index + 1)
            })
            .collect();
        self.set_descriptors(queue, &descriptors);
        self.kick(queue, 0);
    }

    /// Waits for something that a device's thread does.
    pub fn wait(&self, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < deadline, "the device does not answer");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the device calls itself broken.
    pub fn wait_broken(&self) {
        self.wait(|driver| driver.status.needs_reset());
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }
}

/// The machine's parts for a transport under test.
pub fn environment() -> (super::pci::Environment, Arc<FakeHypervisor>) {
    let hypervisor = Arc::new(FakeHypervisor::default());
    let environment = super::pci::Environment {
        hypervisor: hypervisor.clone(),
        mem: GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap(),
        memory: Arc::default(),
        ports: Arc::default(),
    };
    (environment, hypervisor)
}
