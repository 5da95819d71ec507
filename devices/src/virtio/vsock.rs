//! Socket device (Virtio 1.3, 5.10): the host kernel's vhost-vsock moves the data.

use std::{io, sync::Arc};

use thiserror::Error;
use vhost::{VhostBackend, vhost_kern::vsock::Vsock as VhostVsock, vsock::VhostVsock as _};

use super::{
    ActivateError, Activation, ActiveQueue, VirtioDevice, read_bytes,
    vhost::{host_error, set_up},
};
use crate::GuestMemory;

/// Context ids below are the hypervisor's, reserved, and the host's (`include/uapi/linux/vm_sockets.h`).
pub const MIN_CID: u32 = 3;
const QUEUE_SIZES: &[u16] = &[128, 128, 128];
const VIRTIO_VSOCK_F_SEQPACKET: u64 = 1 << 1;
/// Transport features that the transport negotiates on its own.
const TRANSPORT: u64 = 1 << 28 | 1 << 29 | 1 << 32;

/// Why there is no socket device.
#[derive(Debug, Error)]
pub enum VsockError {
    /// Not an id that a guest can have.
    #[error("--vsock cid={0}: the id must be from {MIN_CID} to 4294967294")]
    Cid(u32),
    /// The host's device is missing or closed to us.
    #[error(
        "--vsock: cannot open /dev/vhost-vsock; load it with `modprobe vhost_vsock`, and see that you may write it"
    )]
    Open(#[source] io::Error),
    /// Another guest has the id.
    #[error("--vsock cid={0}: another guest has this id; give another")]
    CidInUse(u32),
    /// vhost refused something.
    #[error("--vsock: the host's vhost-vsock cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// The socket device.
pub struct Vsock {
    backend: VhostVsock<Arc<GuestMemory>>,
    cid: u64,
    backend_features: u64,
    running: bool,
}

impl std::fmt::Debug for Vsock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vsock").field("cid", &self.cid).finish()
    }
}

impl Vsock {
    /// A device with context id `cid`. The id is taken at once.
    pub fn new(cid: u32, mem: &GuestMemory) -> Result<Self, VsockError> {
        if !(MIN_CID..u32::MAX).contains(&cid) {
            return Err(VsockError::Cid(cid));
        }
        let backend = VhostVsock::new(Arc::new(mem.clone()))
            .map_err(|e| VsockError::Open(io::Error::other(e)))?;
        let fail = |action| {
            move |error| VsockError::Host {
                action,
                source: io::Error::other(error),
            }
        };
        backend.set_owner().map_err(fail("be owned"))?;
        let backend_features = backend.get_features().map_err(fail("tell its features"))?;
        backend
            .set_guest_cid(cid.into())
            .map_err(|error| match error {
                vhost::Error::IoctlError(e) if e.kind() == io::ErrorKind::AddrInUse => {
                    VsockError::CidInUse(cid)
                }
                other => fail("take the context id")(other),
            })?;
        Ok(Self {
            backend,
            cid: cid.into(),
            backend_features,
            running: false,
        })
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u32 {
        19
    }

    fn name(&self) -> &'static str {
        "vsock"
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.backend_features & VIRTIO_VSOCK_F_SEQPACKET
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.cid.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The event queue stays with the driver: there is nothing to report before live migration.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queues: Vec<&ActiveQueue> = activation.queues[..2]
            .iter()
            .zip(0..)
            .map(|(queue, index)| queue.as_ref().ok_or(ActivateError::QueueNotReady(index)))
            .collect::<Result<_, _>>()?;
        let features =
            activation.features & self.backend_features & (TRANSPORT | VIRTIO_VSOCK_F_SEQPACKET);
        set_up(
            self.name(),
            &self.backend,
            &activation.mem,
            features,
            &queues,
        )?;
        self.backend
            .start()
            .map_err(|error| host_error("vsock", "start vhost", error))?;
        self.running = true;
        Ok(())
    }

    fn reset(&mut self) {
        if std::mem::take(&mut self.running)
            && let Err(error) = self.backend.stop()
        {
            tracing::error!(%error, "cannot stop vhost-vsock");
        }
    }
}
