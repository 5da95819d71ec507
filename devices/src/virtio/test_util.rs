//! A driver for unit tests: queues in memory, requests made of raw descriptors.

#![allow(missing_docs)]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use virtio_queue::{
    Queue, QueueT,
    desc::{RawDescriptor, split::Descriptor},
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
        let mem = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        Self::with_memory(queues, mem)
    }

    /// A driver in the memory of a machine, of which the first megabyte is the queues'. What an earlier
    /// driver left there is cleared.
    pub fn with_memory(queues: usize, mem: GuestMemory) -> Self {
        let rings = vec![0; queues * QUEUE_SPACE as usize];
        mem.write_slice(&rings, GuestAddress(0x1000)).unwrap();
        Self {
            mem,
            status: DeviceStatus::new(),
            kicks: (0..queues)
                .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
                .collect(),
            hypervisor: FakeHypervisor::default(),
        }
    }

    /// Descriptor table, available ring and used ring of a queue.
    fn rings(index: usize) -> [u64; 3] {
        let table = 0x1000 + index as u64 * QUEUE_SPACE;
        [table, table + 0x1000, table + 0x2000]
    }

    pub fn activation(&self) -> Activation {
        self.activation_with(0)
    }

    pub fn activation_with(&self, features: u64) -> Activation {
        let queues = self.kicks.iter().enumerate().map(|(index, kick)| {
            let mut queue = Queue::new(QUEUE_SIZE).unwrap();
            let [table, available, used] = Self::rings(index).map(|at| Some(at as u32));
            queue.set_desc_table_address(table, Some(0));
            queue.set_avail_ring_address(available, Some(0));
            queue.set_used_ring_address(used, Some(0));
            queue.set_ready(true);
            Some(ActiveQueue {
                index: index as u16,
                queue,
                kick: kick.try_clone().unwrap(),
                vector: Some(self.hypervisor.msi_vector().unwrap()),
                counters: Arc::default(),
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
        let [table, ..] = Self::rings(queue);
        for (at, descriptor) in (table..).step_by(16).zip(descriptors) {
            let descriptor = RawDescriptor::from(*descriptor);
            self.mem.write_obj(descriptor, GuestAddress(at)).unwrap();
        }
    }

    /// Makes descriptor `head` available and kicks.
    pub fn kick(&self, queue: usize, head: u16) {
        let [_, available, _] = Self::rings(queue);
        let index = self.u16(available + 2);
        let entry = available + 4 + u64::from(index % QUEUE_SIZE) * 2;
        self.write(entry, &head.to_le_bytes());
        self.set_available_index(queue, index.wrapping_add(1));
        self.kicks[queue].write(1).unwrap();
    }

    /// Sets the index of the available ring, whatever the ring holds.
    pub fn set_available_index(&self, queue: usize, index: u16) {
        let [_, available, _] = Self::rings(queue);
        self.write(available + 2, &index.to_le_bytes());
    }

    /// Makes a queue as it was at first, for a device that is activated again.
    pub fn clear_rings(&self, queue: usize) {
        let [_, available, used] = Self::rings(queue);
        for ring in [available, used] {
            self.write(ring, &[0; 4]);
        }
    }

    fn u16(&self, address: u64) -> u16 {
        self.mem.read_obj(GuestAddress(address)).unwrap()
    }

    pub fn used_index(&self, queue: usize) -> u16 {
        let [.., used] = Self::rings(queue);
        self.u16(used + 2)
    }

    /// The head of the chain that was used as number `index`.
    pub fn used_head(&self, queue: usize, index: u16) -> u16 {
        let [.., used] = Self::rings(queue);
        self.u16(used + 4 + u64::from(index % QUEUE_SIZE) * 8)
    }

    /// Submits a chain of (address, length, flags) and waits for it; the used length.
    pub fn request(&mut self, queue: usize, chain: &[(u64, u32, u16)]) -> u32 {
        let before = self.used_index(queue);
        self.submit(queue, chain);
        self.wait(|driver| driver.used_index(queue) != before);
        let [.., used] = Self::rings(queue);
        let entry = used + 4 + u64::from(before % QUEUE_SIZE) * 8;
        self.mem.read_obj(GuestAddress(entry + 4)).unwrap()
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
        let start = Instant::now();
        while !done(self) {
            let waited = start.elapsed();
            assert!(waited < PATIENCE, "the device does not answer");
            // Most answers come at once, and fuzzing asks for many.
            if waited < Duration::from_millis(1) {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_millis(1));
            }
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
pub fn environment() -> (crate::pci::FunctionContext, Arc<FakeHypervisor>) {
    let hypervisor = Arc::new(FakeHypervisor::default());
    let environment = crate::pci::FunctionContext {
        hypervisor: hypervisor.clone(),
        mem: GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap(),
        memory: Arc::default(),
        ports: Arc::default(),
    };
    (environment, hypervisor)
}
