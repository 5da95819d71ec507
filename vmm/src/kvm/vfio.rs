//! KVM's list of passed-through devices (Linux `Documentation/virt/kvm/devices/vfio.rst`).

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use fanlight_devices::{hypervisor::AddedDevice, sync::Mutex};
use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};

use super::io_error;

/// The list. The machine's first passed-through device creates it.
#[derive(Debug)]
pub struct VfioDevices {
    vm: Arc<VmFd>,
    list: Mutex<Option<Arc<DeviceFd>>>,
}

impl VfioDevices {
    /// No list yet.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            list: Mutex::new(None),
        }
    }

    /// Adds a device by its descriptor.
    pub fn add(&self, device: BorrowedFd<'_>) -> io::Result<AddedDevice> {
        let mut list = self.list.lock();
        let list = match &*list {
            Some(list) => list.clone(),
            None => {
                let mut request = kvm_create_device {
                    type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
                    ..Default::default()
                };
                let new = self.vm.create_device(&mut request).map_err(io_error)?;
                list.insert(Arc::new(new)).clone()
            }
        };
        // KVM finds the file by its number again when it is removed.
        let device = device.try_clone_to_owned()?;
        set(&list, KVM_DEV_VFIO_FILE_ADD, &device)?;
        Ok(AddedDevice::new(move || {
            if let Err(error) = set(&list, KVM_DEV_VFIO_FILE_DEL, &device) {
                tracing::error!(%error, "KVM does not let go of a passed-through device");
            }
        }))
    }
}

fn set(list: &DeviceFd, verb: u32, device: &OwnedFd) -> io::Result<()> {
    let number = device.as_raw_fd();
    let attribute = kvm_device_attr {
        group: KVM_DEV_VFIO_FILE,
        attr: verb.into(),
        // The kernel reads a descriptor number there.
        addr: std::ptr::from_ref(&number).expose_provenance() as u64,
        flags: 0,
    };
    list.set_device_attr(&attribute).map_err(io_error)
}
