//! Moves frames between the queues and the tap without vhost: a thread for each direction.

use std::{
    io::{ErrorKind, Read, Write},
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
};

use super::tap::{HEADER_LEN, Tap};
use crate::virtio::{DeviceQueue, QueueError, QueueHandler, Request};

/// The largest frame that segmentation offload makes, with its header.
const MAX_FRAME: usize = HEADER_LEN + 14 + 65_535 + 14;
/// Position of `num_buffers` in the header: the number of buffers that hold the frame.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;

/// Frames from the tap to the driver.
pub struct Receive {
    queue: DeviceQueue,
    tap: Arc<Tap>,
    /// Whether a frame may be spread over several buffers (MRG_RXBUF).
    merge: bool,
    frame: Vec<u8>,
    /// Length of a frame that was read before the driver had buffers for it.
    waiting: Option<usize>,
}

impl Receive {
    pub fn new(queue: DeviceQueue, tap: Arc<Tap>, merge: bool) -> Self {
        Self {
            queue,
            tap,
            merge,
            frame: vec![0; MAX_FRAME],
            waiting: None,
        }
    }

    /// Pops requests until `taken` has room for `len` bytes. Returns false if the driver has not given that many; the
    /// popped requests stay in `taken`.
    fn buffers(&mut self, len: usize, taken: &mut Vec<Request>) -> Result<bool, QueueError> {
        let mut room: u64 = taken.iter().map(|request| request.writable.len()).sum();
        while room < len as u64 {
            if !taken.is_empty() && !self.merge {
                // Without MRG_RXBUF one buffer must hold the frame. This one is too small: the frame is lost, as in any
                // network.
                return Ok(true);
            }
            let Some(request) = self.queue.pop()? else {
                return Ok(false);
            };
            room += request.writable.len();
            taken.push(request);
        }
        Ok(true)
    }

    fn deliver(&mut self, len: usize, taken: Vec<Request>) -> Result<(), QueueError> {
        if let (Some(count), Ok(taken)) =
            (self.frame.get_mut(NUM_BUFFERS), u16::try_from(taken.len()))
        {
            count.copy_from_slice(&taken.to_le_bytes());
        }
        let mut rest = &self.frame[..len];
        for request in taken {
            let written = request
                .writable
                .write(self.queue.memory(), rest)
                .unwrap_or(0);
            rest = &rest[written..];
            self.queue.push(request.head, written as u32)?;
        }
        Ok(())
    }
}

impl QueueHandler for Receive {
    fn sources(&self) -> Vec<RawFd> {
        vec![self.queue.kick().as_raw_fd(), self.tap.as_raw_fd()]
    }

    fn ready(&mut self, _source: usize) -> Result<(), QueueError> {
        self.queue.clear_kick();
        let mut taken = Vec::new();
        loop {
            let len = match self.waiting.take() {
                Some(len) => len,
                None => match self.tap.file().read(&mut self.frame) {
                    Ok(len) => len,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(source) => {
                        return Err(QueueError::Host {
                            action: "read from the tap",
                            source,
                        });
                    }
                },
            };
            while !self.buffers(len, &mut taken)? {
                // Buffers may have arrived before the kick was enabled, so the loop looks again.
                if !self.queue.set_notification(true)? {
                    self.waiting = Some(len);
                    self.give_back(taken);
                    return Ok(());
                }
            }
            self.deliver(len, std::mem::take(&mut taken))?;
        }
    }
}

impl Receive {
    /// Returns the popped requests to the queue, to be popped again.
    fn give_back(&mut self, taken: Vec<Request>) {
        for _ in taken {
            self.queue.unpop();
        }
    }
}

/// Frames from the driver to the tap.
pub struct Transmit {
    queue: DeviceQueue,
    tap: Arc<Tap>,
    frame: Vec<u8>,
}

impl Transmit {
    pub fn new(queue: DeviceQueue, tap: Arc<Tap>) -> Self {
        Self {
            queue,
            tap,
            frame: vec![0; MAX_FRAME],
        }
    }
}

impl QueueHandler for Transmit {
    fn sources(&self) -> Vec<RawFd> {
        vec![self.queue.kick().as_raw_fd()]
    }

    fn ready(&mut self, _source: usize) -> Result<(), QueueError> {
        self.queue.clear_kick();
        let Self { queue, tap, frame } = self;
        queue.drain(|mem, request| {
            // Invalid frames and frames that the tap refuses are lost, as in any network.
            let len = request.readable.len();
            if let Ok(len) = usize::try_from(len)
                && let Some(frame) = frame.get_mut(..len)
                && len > HEADER_LEN
                && request.readable.read(mem, frame).is_ok()
                && let Err(error) = tap.file().write(frame)
            {
                tracing::debug!(%error, len, "the tap refused a frame");
            }
            Ok(0)
        })
    }
}
