//! What every device does with its queues: a thread that waits, requests taken with all checks, answers
//! given back.
//!
//! A request that breaks the rules is an error that ends the device's work until it is reset: see
//! [`Worker`].

use std::sync::atomic::Ordering;

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::EventFd;

use super::{
    active_queue::ActiveQueue,
    buffers::{Buffers, Span},
    error::QueueError,
};
use crate::GuestMemory;

/// A queue with the memory that its descriptors point to.
#[derive(Debug)]
pub struct DeviceQueue {
    active: ActiveQueue,
    mem: GuestMemory,
}

/// One request: its buffers, all of them within guest RAM.
#[derive(Debug)]
pub struct Request {
    /// What gives it back.
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: Buffers,
    /// What the device may write.
    pub writable: Buffers,
}

impl DeviceQueue {
    /// Takes over a queue that the driver enabled.
    pub fn new(active: ActiveQueue, mem: GuestMemory) -> Self {
        Self { active, mem }
    }

    /// Index of the queue in the device.
    pub fn index(&self) -> u16 {
        self.active.index
    }

    /// Readable when the driver kicks.
    pub fn kick(&self) -> &EventFd {
        &self.active.kick
    }

    /// Empties the kick descriptor.
    pub fn clear_kick(&self) {
        // An error means that the kick was cleared before.
        let _ = self.active.kick.read();
    }

    fn broken(&self, rule: &'static str) -> QueueError {
        QueueError::Driver {
            queue: self.active.index,
            rule,
        }
    }

    fn ring(&self) -> impl FnOnce(virtio_queue::Error) -> QueueError + use<> {
        let queue = self.active.index;
        move |source| QueueError::Ring { queue, source }
    }

    /// The next request, if there is one.
    pub fn pop(&mut self) -> Result<Option<Request>, QueueError> {
        let ring = self.ring();
        let size = usize::from(self.active.queue.size());
        let Some(mut chain) = self.active.queue.iter(&self.mem).map_err(ring)?.next() else {
            return Ok(None);
        };
        let mut request = Request {
            head: chain.head_index(),
            readable: Buffers::default(),
            writable: Buffers::default(),
        };
        if usize::from(request.head) >= size {
            return Err(self.broken("a chain starts outside of the descriptor table"));
        }
        let mut complete = false;
        for descriptor in chain.by_ref() {
            complete = !descriptor.has_next();
            let buffers = if descriptor.is_write_only() {
                &mut request.writable
            } else if request.writable.0.is_empty() {
                &mut request.readable
            } else {
                return Err(self.broken("a readable buffer follows a writable one"));
            };
            let len = descriptor.len();
            if len == 0 {
                continue;
            }
            if !self.mem.check_range(descriptor.addr(), len as usize) {
                return Err(self.broken("a buffer lies outside of memory"));
            }
            buffers.0.push(Span {
                address: descriptor.addr(),
                len,
            });
        }
        // The iterator stops early at a loop, a table outside of memory or an index outside of it.
        if !complete {
            return Err(self.broken("a chain does not end"));
        }
        let given = request.readable.len();
        let counters = &self.active.counters;
        counters.from_guest.fetch_add(given, Ordering::Relaxed);
        Ok(Some(request))
    }

    /// Puts the request that was taken last back, to be taken again.
    pub fn unpop(&mut self) {
        self.active.queue.go_to_previous_position();
    }

    /// Gives a request back with `written` bytes of it written, and tells the driver if it wants to know.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        let ring = self.ring();
        self.active
            .queue
            .add_used(&self.mem, head, written)
            .map_err(ring)?;
        let counters = &self.active.counters;
        counters.requests.fetch_add(1, Ordering::Relaxed);
        counters
            .to_guest
            .fetch_add(written.into(), Ordering::Relaxed);
        let ring = self.ring();
        if self
            .active
            .queue
            .needs_notification(&self.mem)
            .map_err(ring)?
            && let Some(vector) = &self.active.vector
        {
            vector.event().write(1).map_err(|source| QueueError::Host {
                action: "raise a queue's interrupt",
                source,
            })?;
        }
        Ok(())
    }

    /// Takes and handles requests until there are none; `handle` says how many bytes it wrote.
    pub fn drain(
        &mut self,
        mut handle: impl FnMut(&GuestMemory, Request) -> Result<u32, QueueError>,
    ) -> Result<(), QueueError> {
        loop {
            self.set_notification(false)?;
            while let Some(request) = self.pop()? {
                let (mem, head) = (self.mem.clone(), request.head);
                let written = handle(&mem, request)?;
                self.push(head, written)?;
            }
            if !self.set_notification(true)? {
                return Ok(());
            }
        }
    }

    /// Asks for kicks, or asks for none. When it asks for them: whether requests came meanwhile.
    pub fn set_notification(&mut self, enabled: bool) -> Result<bool, QueueError> {
        let ring = self.ring();
        let queue = &mut self.active.queue;
        if enabled {
            queue.enable_notification(&self.mem).map_err(ring)
        } else {
            queue
                .disable_notification(&self.mem)
                .map_err(ring)
                .map(|()| false)
        }
    }

    /// Guest RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.mem
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
