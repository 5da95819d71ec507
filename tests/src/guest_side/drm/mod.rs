//! Linux's DRM interface as far as tests use it, on the stock virtio-gpu driver: a device, its ioctls, and its first
//! output.

mod calls;
mod card;

use std::{
    env,
    fs::File,
    os::fd::{AsFd, AsRawFd, FromRawFd},
};

pub use card::{Card, Shown};

pub(crate) use calls::{
    Call, ModeInfo, VirtgpuContextInit, VirtgpuExecbuffer, VirtgpuMap, VirtgpuResourceCreate,
    VirtgpuResourceCreateBlob, VirtgpuResourceInfo, VirtgpuTransferToHost, VirtgpuWait,
};
use calls::{GemClose, PrimeFdToHandle, PrimeHandleToFd, Version};

use crate::{Context, Failure, Result};

/// Cards that are searched.
const CARDS: u32 = 8;
/// The environment variable with the number of the wanted virtio GPU; the default is the first.
const CARD: &str = "CARD";

/// The virtio GPU, open.
#[derive(Debug)]
pub struct Device(File);

impl Device {
    /// Finds the device by its driver's name: cards of other drivers may come first.
    pub fn open() -> Result<Self> {
        let mut before = match env::var(CARD) {
            Ok(number) => number.parse().context("CARD is not a number")?,
            Err(_) => 0,
        };
        for number in 0..CARDS {
            let path = format!("/dev/dri/card{number}");
            let Ok(file) = File::options().read(true).write(true).open(&path) else {
                continue;
            };
            let device = Self(file);
            if device.driver()? == "virtio_gpu" {
                if before == 0 {
                    return Ok(device);
                }
                before -= 1;
            }
        }
        Err(Failure("no card has the driver virtio_gpu".into()))
    }

    fn driver(&self) -> Result<String> {
        let mut name = [0u8; 32];
        let mut version = Version {
            name_len: name.len() as u64,
            name: address(&mut name),
            ..Default::default()
        };
        // SAFETY: the name has room for its length; the other texts have length 0.
        unsafe { self.call(&mut version) }?;
        let len = (version.name_len as usize).min(name.len());
        Ok(String::from_utf8_lossy(&name[..len]).into_owned())
    }

    /// Calls an ioctl.
    ///
    /// # Safety
    /// Memory that the argument refers to is valid in the length that the argument gives.
    pub(crate) unsafe fn call<T: Call>(&self, argument: &mut T) -> Result<()> {
        loop {
            // SAFETY: the argument has the type that this request takes; the caller guarantees what it refers to.
            let result =
                unsafe { libc::ioctl(self.0.as_raw_fd(), T::REQUEST as _, argument as *mut T) };
            let error = std::io::Error::last_os_error();
            match (result, error.raw_os_error()) {
                (0.., _) => return Ok(()),
                (_, Some(libc::EINTR | libc::EAGAIN)) => {}
                _ => return Err(Failure::new(T::NAME, error)),
            }
        }
    }

    /// The device file, for mappings.
    pub(crate) fn file(&self) -> &File {
        &self.0
    }

    /// Imports a dma-buf. Returns the handle.
    pub(crate) fn import(&self, dmabuf: &impl AsFd) -> Result<u32> {
        let mut prime = PrimeFdToHandle {
            fd: dmabuf.as_fd().as_raw_fd(),
            ..Default::default()
        };
        // SAFETY: the structure is the whole of the argument.
        unsafe { self.call(&mut prime) }?;
        Ok(prime.handle)
    }

    /// Exports a buffer as a dma-buf.
    pub(crate) fn export(&self, handle: u32) -> Result<File> {
        let mut prime = PrimeHandleToFd {
            handle,
            flags: (libc::O_RDWR | libc::O_CLOEXEC) as u32,
            fd: -1,
        };
        // SAFETY: the structure is the whole of the argument.
        unsafe { self.call(&mut prime) }?;
        // SAFETY: the descriptor is new, and no other owner exists.
        Ok(unsafe { File::from_raw_fd(prime.fd) })
    }

    /// Frees a buffer.
    pub(crate) fn close(&self, handle: u32) -> Result<()> {
        // SAFETY: the structure is the whole of the argument.
        unsafe { self.call(&mut GemClose { handle, pad: 0 }) }
    }
}

/// The address of an array that the kernel reads or writes.
pub(crate) fn address<T>(array: &mut [T]) -> u64 {
    array.as_mut_ptr().expose_provenance() as u64
}
