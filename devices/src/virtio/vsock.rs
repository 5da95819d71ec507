//! Socket device (Virtio 1.3, 5.10) by the host kernel's vhost-vsock.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
};

use thiserror::Error;
use vhost::{VhostBackend, vhost_kern::VhostKernBackend};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::{ActivateError, Activation, ActiveQueue, VirtioDevice, read_bytes, vhost::set_up};
use crate::GuestMemory;

/// Lower context ids are reserved: 0 for the hypervisor, 1 for loopback, 2 for the host
/// (`include/uapi/linux/vm_sockets.h`).
pub const MIN_CID: u32 = 3;
const QUEUE_SIZES: &[u16] = &[128, 128, 128];
const VIRTIO_VSOCK_F_SEQPACKET: u64 = 1 << 1;
/// Features that the transport negotiates itself.
const TRANSPORT: u64 = 1 << 28 | 1 << 29 | 1 << 32;

/// A socket device that cannot be created.
#[derive(Debug, Error)]
pub enum VsockError {
    /// Not a context id for a guest.
    #[error("context id {0}: it must be from {MIN_CID} to 4294967294")]
    Cid(u32),
    /// The host's device is missing, or the user may not open it.
    #[error(
        "cannot open {}; load it with `modprobe vhost_vsock`, and check that this user may write it",
        path.display()
    )]
    Open {
        /// Path of the device.
        path: std::path::PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Another guest has the id.
    #[error("context id {0}: another guest has it; give another")]
    CidInUse(u32),
    /// vhost refused a step.
    #[error("vhost-vsock of the host cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

mod ioctls {
    vmm_sys_util::ioctl_iow_nr!(VHOST_VSOCK_SET_GUEST_CID, 0xaf, 0x60, u64);
    vmm_sys_util::ioctl_iow_nr!(VHOST_VSOCK_SET_RUNNING, 0xaf, 0x61, libc::c_int);
}
use ioctls::{VHOST_VSOCK_SET_GUEST_CID, VHOST_VSOCK_SET_RUNNING};

/// Path of the host's device.
pub const HOST_DEVICE: &str = "/dev/vhost-vsock";

/// The host's device (`include/uapi/linux/vhost.h`). The vhost crate's type always opens a path, so it is not used
/// here.
struct Backend {
    file: File,
    mem: Arc<GuestMemory>,
}

impl Backend {
    fn set_guest_cid(&self, cid: u64) -> io::Result<()> {
        // SAFETY: the ioctl reads one u64.
        match unsafe { ioctl_with_ref(&self.file, VHOST_VSOCK_SET_GUEST_CID(), &cid) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn set_running(&self, running: bool) -> io::Result<()> {
        let running = libc::c_int::from(running);
        // SAFETY: the ioctl reads one int.
        match unsafe { ioctl_with_ref(&self.file, VHOST_VSOCK_SET_RUNNING(), &running) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsRawFd for Backend {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl VhostKernBackend for Backend {
    type AS = Arc<GuestMemory>;

    fn mem(&self) -> &Arc<GuestMemory> {
        &self.mem
    }
}

/// The socket device.
pub struct Vsock {
    backend: Backend,
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
    /// A device with context id `cid` on the open host device `file`. It claims the id at once.
    pub fn new(cid: u32, file: File, mem: &GuestMemory) -> Result<Self, VsockError> {
        if !(MIN_CID..u32::MAX).contains(&cid) {
            return Err(VsockError::Cid(cid));
        }
        let fail = |action| {
            move |error| VsockError::Host {
                action,
                source: io::Error::other(error),
            }
        };
        let backend = Backend {
            file,
            mem: Arc::new(mem.clone()),
        };
        match backend.set_owner() {
            // This process has owned it since before the machine's last reset.
            Err(vhost::Error::IoctlError(error)) if error.kind() == io::ErrorKind::ResourceBusy => {
            }
            result => result.map_err(fail("be owned"))?,
        }
        let backend_features = backend.get_features().map_err(fail("tell its features"))?;
        backend
            .set_guest_cid(cid.into())
            .map_err(|source| match source.kind() {
                io::ErrorKind::AddrInUse => VsockError::CidInUse(cid),
                _ => VsockError::Host {
                    action: "take the context id",
                    source,
                },
            })?;
        Ok(Self {
            backend,
            cid: cid.into(),
            backend_features,
            running: false,
        })
    }

    /// Opens the host device at `path`.
    pub fn open_host_device(path: &std::path::Path) -> Result<File, VsockError> {
        use std::os::unix::fs::OpenOptionsExt;
        std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|source| VsockError::Open {
                path: path.into(),
                source,
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

    /// The event queue is not given to vhost: without live migration there are no events.
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
            .set_running(true)
            .map_err(|source| ActivateError::Host {
                device: "vsock",
                action: "start vhost".into(),
                source,
            })?;
        self.running = true;
        Ok(())
    }

    fn reset(&mut self) {
        if std::mem::take(&mut self.running)
            && let Err(error) = self.backend.set_running(false)
        {
            tracing::error!(%error, "cannot stop vhost-vsock");
        }
    }
}
