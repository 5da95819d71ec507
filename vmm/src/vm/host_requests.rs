//! When the host wants a passed-through device back: one descriptor to wait on for all devices. The kernel asks
//! every ten seconds until it has it (Linux `drivers/vfio/vfio_main.c`, `vfio_unregister_group_dev`).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use fanlight_devices::vfio::{HostDevice, VfioError};
use rustix::event::epoll;

use crate::vm::passthrough::{PassedThrough, Passthrough};

/// Readable when the host has asked for a device.
#[derive(Debug)]
pub struct HostRequests(OwnedFd);

impl HostRequests {
    /// Listens for requests of these devices.
    pub fn new(passthrough: Option<&Passthrough>) -> Result<Self, VfioError> {
        let requests = Self(
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|source| VfioError::Host {
                action: "wait for the host's requests",
                source: source.into(),
            })?,
        );
        for passed in passthrough.iter().flat_map(|all| &all.devices) {
            requests.follow(&passed.device)?;
        }
        Ok(requests)
    }

    /// Listens for one more device's. That ends as the device is closed.
    pub fn follow(&self, device: &HostDevice) -> Result<(), VfioError> {
        // SAFETY: the descriptor is open for as long as `device` is borrowed.
        let event = unsafe { BorrowedFd::borrow_raw(device.request().as_raw_fd()) };
        // Whose it is, is asked of the devices: a name may be another one's by then.
        let data = epoll::EventData::new_u64(0);
        epoll::add(&self.0, event, data, epoll::EventFlags::IN).map_err(|source| VfioError::Host {
            action: "wait for the host's requests",
            source: source.into(),
        })
    }

    /// Names of the devices that the host has asked for since the last call.
    pub fn take(passthrough: Option<&Passthrough>) -> Vec<String> {
        let asked = |passed: &&PassedThrough| passed.device.take_request();
        let devices = passthrough.iter().flat_map(|all| &all.devices);
        devices
            .filter(asked)
            .map(|passed| passed.id.clone())
            .collect()
    }
}

impl AsFd for HostRequests {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
