//! Threads that serve a device's queues.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    error::{ActivateError, QueueError},
    status::DeviceStatus,
};

/// Work of a device on its own thread.
pub trait QueueHandler: Send {
    /// Descriptors to wait on, constant for the handler's life.
    fn sources(&self) -> Vec<RawFd>;

    /// Called when the source of this index becomes readable, and not again until the handler has emptied it.
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

/// Event data of the stop request; events of sources have their index.
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
