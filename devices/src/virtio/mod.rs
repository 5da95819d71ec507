//! Virtio 1.x devices and their PCI transport. One file a device.
//!
//! A device implements [`VirtioDevice`]. The transport ([`transport`]) owns the registers, the feature
//! negotiation and the queues' configuration; it hands the queues over at DRIVER_OK and takes the
//! device back to its initial state by [`VirtioDevice::reset`].

mod active_queue;
pub mod block;
mod buffers;
pub mod console;
mod device;
mod error;
pub mod gpu;
pub mod input;
pub mod net;
mod queue;
pub mod rng;
mod status;
#[cfg(any(test, feature = "test-util"))]
pub mod test_util;
pub mod transport;
mod vhost;
pub mod vsock;
mod worker;

pub use active_queue::{ActiveQueue, QueueCounters};
pub use buffers::Buffers;
use device::read_bytes;
pub use device::{Activation, VirtioDevice};
pub use error::{ActivateError, QueueError};
pub use queue::{DeviceQueue, Request};
pub use status::{DeviceStatus, OnError};
pub use worker::{QueueHandler, Worker};
