//! What every device does with its queues: a thread that waits, requests taken with all checks, answers
//! given back.
//!
//! A request that breaks the rules is an error that ends the device's work until it is reset: see
//! [`Worker`].

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use thiserror::Error;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, VolatileSlice};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{ActivateError, ActiveQueue, DeviceStatus};
use crate::GuestMemory;

/// What ends a device's work.
#[derive(Debug, Error)]
pub enum QueueError {
    /// The driver broke a rule.
    #[error("the guest's driver broke the rules of queue {queue}: {rule}")]
    Driver {
        /// The queue.
        queue: u16,
        /// What it did.
        rule: &'static str,
    },
    /// The rings cannot be read or written.
    #[error("cannot use the rings of queue {queue}")]
    Ring {
        /// The queue.
        queue: u16,
        /// The cause.
        #[source]
        source: virtio_queue::Error,
    },
    /// The host failed.
    #[error("cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What a queue has done since its function was made.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// Requests given back.
    pub requests: AtomicU64,
    /// Bytes that the driver gave.
    pub from_guest: AtomicU64,
    /// Bytes that the driver got.
    pub to_guest: AtomicU64,
}

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
        // It is not an error that somebody emptied it before.
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    address: GuestAddress,
    len: u32,
}

/// Buffers of a request in order; their bytes are one sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buffers(Vec<Span>);

impl Buffers {
    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.0.iter().map(|span| u64::from(span.len)).sum()
    }

    /// Whether there is not a single byte.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes the first `count` bytes off, or as many as there are.
    pub fn take_front(&mut self, count: u64) -> Buffers {
        let mut left = count;
        let whole = self.0.iter().take_while(|span| {
            let fits = u64::from(span.len) <= left;
            left -= if fits { u64::from(span.len) } else { 0 };
            fits
        });
        let whole = whole.count();
        let mut taken: Vec<_> = self.0.drain(..whole).collect();
        if left > 0
            && let Some(first) = self.0.first_mut()
        {
            taken.push(Span {
                address: first.address,
                len: left as u32,
            });
            first.address = GuestAddress(first.address.0 + left);
            first.len -= left as u32;
        }
        Buffers(taken)
    }

    /// Reads all bytes into `data`, which must be as long; what is missing stays as it is.
    pub fn read(&self, mem: &GuestMemory, data: &mut [u8]) -> Result<(), GuestMemoryError> {
        let mut rest = data;
        for span in &self.0 {
            let len = rest.len().min(span.len as usize);
            let (part, after) = rest.split_at_mut(len);
            mem.read_slice(part, span.address)?;
            rest = after;
        }
        Ok(())
    }

    /// Writes `data` from the first byte on. Returns how many bytes found room.
    pub fn write(&self, mem: &GuestMemory, data: &[u8]) -> Result<usize, GuestMemoryError> {
        let mut rest = data;
        for span in &self.0 {
            let (part, after) = rest.split_at(rest.len().min(span.len as usize));
            mem.write_slice(part, span.address)?;
            rest = after;
        }
        Ok(data.len() - rest.len())
    }

    /// Where they are: addresses and lengths.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let spans = self.0.iter();
        spans.map(|span| (span.address.0, span.len.into()))
    }

    /// The bytes in place.
    pub fn slices<'a>(
        &self,
        mem: &'a GuestMemory,
    ) -> Result<Vec<VolatileSlice<'a>>, GuestMemoryError> {
        let spans = self.0.iter();
        spans
            .map(|span| mem.get_slice(span.address, span.len as usize))
            .collect()
    }
}

/// A device's work on its own thread.
pub trait QueueHandler: Send {
    /// Descriptors to wait on, fixed for the handler's life.
    fn sources(&self) -> Vec<RawFd>;

    /// The source of this index became readable. It is not told again before it has been emptied.
    fn ready(&mut self, source: usize) -> Result<(), QueueError>;
}

/// A thread that runs a [`QueueHandler`]. Dropping stops and joins it.
///
/// After an error the device needs a reset, and the handler is not called again.
#[derive(Debug)]
pub struct Worker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

/// Data of the event that stops the thread; sources have their index.
const STOP: u32 = u32::MAX;

struct Subscriber<H> {
    handler: H,
    name: String,
    stop: EventFd,
    status: DeviceStatus,
    stopped: Arc<AtomicBool>,
}

impl Worker {
    /// Starts the thread.
    pub fn spawn(
        name: impl Into<String>,
        status: DeviceStatus,
        handler: impl QueueHandler + 'static,
    ) -> Result<Self, ActivateError> {
        let name = name.into();
        let fail = |action: &str, source| ActivateError::Host {
            device: "virtio",
            action: action.into(),
            source,
        };
        let stop = EventFd::new(EFD_NONBLOCK).map_err(|e| fail("make a descriptor", e))?;
        let stopped = Arc::new(AtomicBool::new(false));
        let subscriber = Subscriber {
            handler,
            name: name.clone(),
            stop: stop
                .try_clone()
                .map_err(|e| fail("duplicate a descriptor", e))?,
            status,
            stopped: stopped.clone(),
        };
        let mut events =
            EventManager::new().map_err(|e| fail("wait for events", io::Error::other(e)))?;
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || {
                events.add_subscriber(subscriber);
                while !stopped.load(Ordering::Acquire) {
                    if let Err(error) = events.run() {
                        tracing::error!(%error, "a device's thread cannot wait for events");
                        return;
                    }
                }
            })
            .map_err(|e| fail("start a thread", e))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl<H: QueueHandler> MutEventSubscriber for Subscriber<H> {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.data() == STOP {
            self.stopped.store(true, Ordering::Release);
            return;
        }
        if let Err(error) = self.handler.ready(events.data() as usize) {
            tracing::warn!(
                device = self.name,
                error = %crate::error_line(&error),
                "the device needs a reset"
            );
            self.status.set_needs_reset();
            for fd in self.handler.sources() {
                if let Err(error) = ops.remove(Events::empty_raw(fd)) {
                    tracing::error!(%error, "cannot stop waiting on a device's descriptor");
                }
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let sources = self.handler.sources();
        let sources = (0..).zip(sources).map(|(index, fd)| (fd, index));
        for (fd, data) in sources.chain([(self.stop.as_raw_fd(), STOP)]) {
            if let Err(error) = ops.add(Events::with_data_raw(
                fd,
                data,
                EventSet::IN | EventSet::EDGE_TRIGGERED,
            )) {
                tracing::error!(%error, device = self.name, "cannot wait on a device's descriptor");
                self.status.set_needs_reset();
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            tracing::error!(%error, "cannot stop a device's thread");
            return;
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
