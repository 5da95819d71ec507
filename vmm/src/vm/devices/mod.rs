//! The kinds of devices that a machine can have, one file each, behind one trait.
//!
//! The file of a kind opens host resources from the kind's configuration, which are kept over resets. It also builds
//! the function that a machine has between two resets. A new kind needs its file, its line in [`KINDS`], its type in
//! the configuration of the API, and tests.

mod console;
pub mod disk;
mod entry;
mod error;
pub mod gpu;
pub mod host_requests;
pub mod input;
pub mod names;
mod net;
mod rng;
mod vfio;
mod vsock;

use std::{any::Any, sync::Arc};

use fanlight_api::{VmConfig, socket::Descriptors};
use fanlight_devices::{
    dma::SharedBlobDmaMap,
    memory::GuestRam,
    pci::FunctionContext,
    vfio::Iommu,
    virtio::{VirtioDevice, transport::VirtioPciFunction},
};
use vmm_sys_util::eventfd::EventFd;

pub use entry::{Entry, Hotplug, Place};
pub use error::{DeviceError, Failure, of_device};

use crate::{
    host::console::HostConsole,
    vm::{function::Function, guest_console::GuestConsole},
};

/// All kinds, in bus order.
pub static KINDS: [&Kind; 8] = [
    &vfio::KIND,
    &disk::KIND,
    &net::KIND,
    &vsock::KIND,
    &rng::KIND,
    &gpu::KIND,
    &input::KIND,
    &console::KIND,
];

/// The kinds whose devices can be added and removed while the machine runs.
pub fn hotplug_kinds() -> impl Iterator<Item = (&'static Kind, &'static Hotplug)> {
    KINDS
        .into_iter()
        .filter_map(|kind| Some((kind, kind.hotplug.as_ref()?)))
}

/// PCI class codes that several kinds share (PCI Code and ID Assignment 1.11).
const CLASS_COMMUNICATION_OTHER: u32 = 0x07_8000;
const CLASS_OTHER: u32 = 0xff_0000;

/// A kind of device.
pub struct Kind {
    /// Its field in the configuration and in `device.add`, and its command-line option. Device names begin with it.
    pub field: &'static str,
    /// What people call it.
    pub title: &'static str,
    /// Opens its devices in the configuration.
    pub open: fn(&mut Opening) -> Opened,
    /// What `device.add` and removal need; none if its devices can be neither added nor removed.
    pub hotplug: Option<Hotplug>,
}

/// The devices that a kind opened.
pub type Opened = Result<Vec<Box<dyn Device>>, DeviceError>;

/// What devices are opened from.
pub struct Opening<'a> {
    /// The configuration, or the part that is to be added to it.
    pub config: &'a VmConfig,
    /// The descriptors that it names.
    pub descriptors: &'a Descriptors,
    /// Guest RAM.
    pub ram: &'a GuestRam,
    /// Devices that the machine has already.
    pub present: &'a Devices,
    /// Takes the backend of the virtio console, whose input the main loop reads.
    pub console: Option<HostConsole>,
}

/// What a device is built from. A life of the machine is the time between two resets.
pub struct Life<'a> {
    /// Number of vCPUs.
    pub cpus: u32,
    /// The hypervisor, guest RAM and the address maps.
    pub context: &'a FunctionContext,
    /// Blobs that passed-through devices reach.
    pub shared_blobs: &'a Arc<SharedBlobDmaMap>,
    /// Takes the guest's side of consoles.
    pub consoles: &'a mut Vec<GuestConsole>,
    /// The number of the next passed-through function. Each number is used once.
    pub next_function: &'a mut u32,
}

impl Kind {
    /// Opens a device of this kind for each entry. `id` tells the entry's name, for errors.
    fn open_each<C, D: Device>(
        &self,
        entries: impl IntoIterator<Item = C>,
        id: impl Fn(&C) -> Option<&str>,
        mut open: impl FnMut(C) -> Result<D, Failure>,
    ) -> Opened {
        let device = |entry| {
            let id = id(&entry).map(str::to_owned);
            match open(entry) {
                Ok(device) => Ok(Box::new(device) as Box<dyn Device>),
                Err(failure) => Err(self.error(id.as_deref(), failure)),
            }
        };
        entries.into_iter().map(device).collect()
    }
}

impl Life<'_> {
    /// The PCI function of a virtio device with this PCI class code.
    pub fn virtio(&self, device: Box<dyn VirtioDevice>, class: u32) -> Result<Function, Failure> {
        let function = VirtioPciFunction::new(device, class, self.context)?;
        Ok(Function::Virtio(function))
    }
}

/// The host side of one device: opened once, kept over resets. Dropping it closes its host resources.
pub trait Device: Any {
    /// Its kind.
    fn kind(&self) -> &'static Kind;

    /// Its name for the API, unique in the machine.
    fn id(&self) -> &str;

    /// The port that it is behind; on the root bus if none.
    fn port(&self) -> Option<u8> {
        None
    }

    /// Builds its function for one life of the machine.
    fn build(&self, life: &mut Life) -> Result<Function, Failure>;

    /// Whether it does peer-to-peer DMA. Such devices are put into one switch.
    fn shares_memory(&self) -> bool {
        false
    }

    /// The IOMMU context of a passed-through device. Guest RAM is mapped there.
    fn iommu(&self) -> Option<&Arc<Iommu>> {
        None
    }

    /// Signalled when the host wants a passed-through device back.
    fn host_request(&self) -> Option<&EventFd> {
        None
    }
}

/// The devices of a machine, in bus order.
#[derive(Default)]
pub struct Devices(Vec<Box<dyn Device>>);

impl Devices {
    /// Opens what the configuration of `opening` names, each of which has a name.
    pub fn open(opening: &mut Opening) -> Result<Self, DeviceError> {
        let mut devices = Self::default();
        for kind in KINDS {
            for device in (kind.open)(opening)? {
                if devices.find(device.id()).is_some() {
                    let taken = names::NameError::Taken(device.id().into());
                    return Err(kind.error(Some(device.id()), taken));
                }
                devices.push(device);
            }
        }
        Ok(devices)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &dyn Device> {
        self.0.iter().map(|device| &**device)
    }

    /// Those of one type.
    pub fn of<T: Device>(&self) -> impl Iterator<Item = &T> {
        let devices = self.iter();
        devices.filter_map(|device| (device as &dyn Any).downcast_ref())
    }

    /// The device of this name.
    pub fn find(&self, id: &str) -> Option<&dyn Device> {
        self.iter().find(|device| device.id() == id)
    }

    /// Adds a device.
    pub fn push(&mut self, device: Box<dyn Device>) {
        self.0.push(device);
    }

    /// Removes and returns the device of this name.
    pub fn take(&mut self, id: &str) -> Option<Box<dyn Device>> {
        let at = self.0.iter().position(|device| device.id() == id)?;
        Some(self.0.remove(at))
    }

    /// The IOMMU context of the passed-through devices, if there are any.
    pub fn iommu(&self) -> Option<&Arc<Iommu>> {
        self.iter().find_map(|device| device.iommu())
    }

    /// Whether passed-through and other devices do peer-to-peer DMA with each other, which needs a switch.
    pub fn need_switch(&self) -> bool {
        let shares = |device: &dyn Device| device.shares_memory() && device.iommu().is_none();
        self.iommu().is_some() && self.iter().any(shares)
    }
}
