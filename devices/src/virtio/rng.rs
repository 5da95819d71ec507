//! Entropy device (Virtio 1.3, 5.4): fills the driver's buffers with random bytes of the host.

use std::os::fd::{AsRawFd, RawFd};

use rustix::rand::{GetRandomFlags, getrandom};

use super::{
    ActivateError, Activation, DeviceQueue, QueueError, QueueHandler, Request, VirtioDevice, Worker,
};
use crate::GuestMemory;

const QUEUE_SIZES: &[u16] = &[64];
/// The most bytes for one request. One chain can describe the same memory many times. Without a bound a guest could
/// have the host generate gigabytes of random bytes for a single kick.
const MAX_REQUEST: u64 = 64 << 10;

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    worker: Option<Worker>,
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        4
    }

    fn name(&self) -> &'static str {
        "rng"
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let queue = activation.take_queue(0)?;
        self.worker = Some(Worker::spawn("rng", activation.status, Handler { queue })?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

struct Handler {
    queue: DeviceQueue,
}

impl QueueHandler for Handler {
    fn sources(&self) -> Vec<RawFd> {
        vec![self.queue.kick().as_raw_fd()]
    }

    fn ready(&mut self, _source: usize) -> Result<(), QueueError> {
        self.queue.clear_kick();
        self.queue.drain(fill)
    }
}

fn fill(mem: &GuestMemory, request: Request) -> Result<u32, QueueError> {
    let mut bytes = vec![0; request.writable.len().min(MAX_REQUEST) as usize];
    let mut filled = 0;
    while filled < bytes.len() {
        filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty()).map_err(|error| {
            QueueError::Host {
                action: "get random bytes",
                source: error.into(),
            }
        })?;
    }
    let written = request.writable.write(mem, &bytes).unwrap_or(0);
    Ok(written as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::test_util::{Driver, WRITE};

    #[test]
    fn fills_what_it_is_given_and_no_more_than_the_bound() {
        let mut driver = Driver::new(1);
        let mut rng = Rng::default();
        rng.activate(driver.activation()).unwrap();
        let used = driver.request(0, &[(0x10_0000, 32, WRITE)]);
        assert_eq!(used, 32);
        assert_ne!(driver.read(0x10_0000, 32), vec![0; 32]);
        let used = driver.request(0, &[(0x10_0000, 1 << 20, WRITE)]);
        assert_eq!(u64::from(used), MAX_REQUEST);
        rng.reset();
    }

    #[test]
    fn each_request_gets_other_bytes() {
        let mut driver = Driver::new(1);
        let mut rng = Rng::default();
        rng.activate(driver.activation()).unwrap();
        let [first, second] = [0x10_0000, 0x20_0000].map(|address| {
            driver.request(0, &[(address, 32, WRITE)]);
            driver.read(address, 32)
        });
        assert_ne!(first, second);
    }
}
