//! The network device: its configuration, and the choice of vhost-net or threads for its queues.

use std::{fmt, io, sync::Arc};

use thiserror::Error;
use vhost::{VhostBackend, net::VhostNet, vhost_kern::net::Net as KernelNet};
use zerocopy::{Immutable, IntoBytes, little_endian};

use super::{
    mac::Mac,
    tap::{Offload, Tap},
    user,
};
use crate::{
    GuestMemory,
    virtio::{
        ActivateError, Activation, ActiveQueue, VirtioDevice, Worker, read_bytes,
        vhost::{host_error, set_up},
    },
};

const VIRTIO_NET_F_CSUM: u64 = 1 << 0;
const VIRTIO_NET_F_GUEST_CSUM: u64 = 1 << 1;
const VIRTIO_NET_F_MAC: u64 = 1 << 5;
const VIRTIO_NET_F_GUEST_TSO4: u64 = 1 << 7;
const VIRTIO_NET_F_GUEST_TSO6: u64 = 1 << 8;
const VIRTIO_NET_F_GUEST_ECN: u64 = 1 << 9;
const VIRTIO_NET_F_HOST_TSO4: u64 = 1 << 11;
const VIRTIO_NET_F_HOST_TSO6: u64 = 1 << 12;
const VIRTIO_NET_F_HOST_ECN: u64 = 1 << 13;
const VIRTIO_NET_F_MRG_RXBUF: u64 = 1 << 15;
const VIRTIO_NET_F_STATUS: u64 = 1 << 16;

const VIRTIO_NET_S_LINK_UP: u16 = 1;

const QUEUE_SIZES: &[u16] = &[256, 256];
const RECEIVE_QUEUE: u16 = 0;
const TRANSMIT_QUEUE: u16 = 1;

/// Features that need vhost-net's support. Offloads are between driver and tap.
const VHOST_FEATURES: u64 = VIRTIO_NET_F_MRG_RXBUF | 1 << 28 | 1 << 29 | 1 << 32;

/// Device configuration (`struct virtio_net_config`), up to the last offered field.
#[derive(Clone, Debug, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    mac: [u8; 6],
    status: little_endian::U16,
}

enum Backend {
    Kernel(KernelNet<Arc<GuestMemory>>),
    User(Vec<Worker>),
}

/// The network device.
pub struct Net {
    tap: Arc<Tap>,
    config: Config,
    backend: Backend,
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net").field("tap", &self.tap).finish()
    }
}

/// vhost-net was required and cannot be used.
#[derive(Debug, Error)]
#[error(
    "cannot use /dev/vhost-net; load it with `modprobe vhost_net`, and check that this user may write it"
)]
pub struct VhostNetError(#[source] io::Error);

impl Net {
    /// A device on `tap`. `vhost` requires or forbids vhost-net; with `None` it is used if possible.
    pub fn new(
        tap: Arc<Tap>,
        mac: Mac,
        vhost: Option<bool>,
        mem: &GuestMemory,
    ) -> Result<Self, VhostNetError> {
        let kernel = || {
            let net = KernelNet::new(Arc::new(mem.clone()))?;
            net.set_owner()?;
            Ok(net)
        };
        let backend = match (vhost, kernel) {
            (Some(false), _) => Backend::User(Vec::new()),
            (wanted, kernel) => match (kernel(), wanted) {
                (Ok(net), _) => Backend::Kernel(net),
                (Err(error), Some(true)) => {
                    let error: vhost::Error = error;
                    return Err(VhostNetError(io::Error::other(error)));
                }
                (Err(error), _) => {
                    tracing::info!(%error, "no vhost-net: frames are moved by Fanlight");
                    Backend::User(Vec::new())
                }
            },
        };
        Ok(Self {
            tap,
            config: Config {
                mac: mac.0,
                status: VIRTIO_NET_S_LINK_UP.into(),
            },
            backend,
        })
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        1
    }

    fn name(&self) -> &'static str {
        "net"
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        VIRTIO_NET_F_CSUM
            | VIRTIO_NET_F_GUEST_CSUM
            | VIRTIO_NET_F_MAC
            | VIRTIO_NET_F_GUEST_TSO4
            | VIRTIO_NET_F_GUEST_TSO6
            | VIRTIO_NET_F_GUEST_ECN
            | VIRTIO_NET_F_HOST_TSO4
            | VIRTIO_NET_F_HOST_TSO6
            | VIRTIO_NET_F_HOST_ECN
            | VIRTIO_NET_F_MRG_RXBUF
            | VIRTIO_NET_F_STATUS
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(self.config.as_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let features = activation.features;
        self.tap
            .set_offload(Offload {
                checksum: features & VIRTIO_NET_F_GUEST_CSUM != 0,
                tso4: features & VIRTIO_NET_F_GUEST_TSO4 != 0,
                tso6: features & VIRTIO_NET_F_GUEST_TSO6 != 0,
                ecn: features & VIRTIO_NET_F_GUEST_ECN != 0,
            })
            .map_err(|source| ActivateError::Host {
                device: "net",
                action: "set the tap's offloads".into(),
                source,
            })?;
        match &mut self.backend {
            Backend::Kernel(kernel) => {
                let queues: Vec<&ActiveQueue> = activation
                    .queues
                    .iter()
                    .zip(0..)
                    .map(|(queue, index)| queue.as_ref().ok_or(ActivateError::QueueNotReady(index)))
                    .collect::<Result<_, _>>()?;
                let features = features & VHOST_FEATURES;
                set_up("net", kernel, &activation.mem, features, &queues)?;
                for index in 0..queues.len() {
                    kernel
                        .set_backend(index, Some(self.tap.file()))
                        .map_err(|error| host_error("net", "start vhost", error))?;
                }
            }
            Backend::User(workers) => {
                let merge = features & VIRTIO_NET_F_MRG_RXBUF != 0;
                let receive = activation.take_queue(RECEIVE_QUEUE)?;
                let transmit = activation.take_queue(TRANSMIT_QUEUE)?;
                let status = activation.status;
                workers.push(Worker::spawn(
                    "net-in",
                    status.clone(),
                    user::Receive::new(receive, self.tap.clone(), merge),
                )?);
                workers.push(Worker::spawn(
                    "net-out",
                    status,
                    user::Transmit::new(transmit, self.tap.clone()),
                )?);
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        match &mut self.backend {
            Backend::Kernel(kernel) => {
                for index in 0..QUEUE_SIZES.len() {
                    // A queue that never ran has no backend to remove.
                    let _ = kernel.set_backend(index, None);
                }
            }
            Backend::User(workers) => workers.clear(),
        }
    }
}
