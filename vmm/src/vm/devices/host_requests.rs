//! Requests of the host for passed-through devices, on one descriptor for all. The kernel repeats a request every ten
//! seconds until the device is closed (Linux `drivers/vfio/vfio_main.c`, `vfio_unregister_group_dev`).

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::event::epoll;

use super::{Device, Devices};

/// Readable when the host has asked for a device.
#[derive(Debug)]
pub struct HostRequests(OwnedFd);

impl HostRequests {
    /// Listens for requests of these devices.
    pub fn new(devices: &Devices) -> io::Result<Self> {
        let requests = Self(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        devices
            .iter()
            .try_for_each(|device| requests.follow(device))?;
        Ok(requests)
    }

    /// Listens for requests of one more device, until it is closed.
    pub fn follow(&self, device: &dyn Device) -> io::Result<()> {
        let Some(request) = device.host_request() else {
            return Ok(());
        };
        // SAFETY: the descriptor is open for as long as `device` is borrowed.
        let event = unsafe { BorrowedFd::borrow_raw(request.as_raw_fd()) };
        // `take` asks all devices: a name stored here could be another device's by then.
        let data = epoll::EventData::new_u64(0);
        Ok(epoll::add(&self.0, event, data, epoll::EventFlags::IN)?)
    }

    /// Names of the devices that the host has asked for since the last call.
    pub fn take(devices: &Devices) -> Vec<String> {
        let asked = |device: &&dyn Device| {
            let request = device.host_request();
            request.is_some_and(|request| request.read().is_ok())
        };
        let devices = devices.iter().filter(asked);
        devices.map(|device| device.id().to_owned()).collect()
    }
}

impl AsFd for HostRequests {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
