//! Why a device does not start, and what ends its work.

use std::io;

use thiserror::Error;

/// Why a device could not take its queues over at DRIVER_OK.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// The driver left a queue that the device cannot work without disabled, or set it up wrongly.
    #[error("the guest's driver did not set up queue {0}")]
    QueueNotReady(u16),
    /// The host refused something.
    #[error("cannot start the {device} device: {action}")]
    Host {
        /// The device's name.
        device: &'static str,
        /// What was tried.
        action: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

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
