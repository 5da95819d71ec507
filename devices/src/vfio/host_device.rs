//! An open device of the host: its regions, its interrupts, its reset.

use std::{
    fs::File,
    io,
    mem::ManuallyDrop,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::FileExt,
    },
    sync::Arc,
};

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_NORESIZE, VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_REQ_IRQ_INDEX,
};
use vfio_ioctls::VfioDevice;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    container::Group,
    error::{VfioError, errno},
    iommu::Iommu,
    sysfs::{HostFunction, PciAddress, VFIO_PCI, others_in_group},
};
use crate::sys::vfio::{self as ioctls, RegionInfo};

/// Regions of a PCI device that Fanlight uses: BARs, ROM, configuration space.
pub const REGIONS: u32 = VFIO_PCI_CONFIG_REGION_INDEX + 1;

/// An open device.
pub struct HostDevice {
    /// Where it is on the host.
    pub address: PciAddress,
    /// The IOMMU address space that bounds its DMA.
    pub iommu: Arc<Iommu>,
    owner: ManuallyDrop<Owner>,
    /// The device's descriptor, for mappings, exports and accesses.
    file: ManuallyDrop<Arc<File>>,
    /// Regions, by number.
    regions: Vec<RegionInfo>,
    /// Signalled when the host requests the device back.
    request: EventFd,
}

/// What keeps the device open.
enum Owner {
    /// Its node, bound to iommufd.
    Node(VfioDevice),
    /// Its group in a container.
    Group(#[expect(dead_code, reason = "dropped, for it leaves the container then")] Arc<Group>),
}

impl std::fmt::Debug for HostDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostDevice({})", self.address)
    }
}

impl HostDevice {
    /// Opens `function` in the address space `iommu`. `node` is an open descriptor, if there is one: the device
    /// node for iommufd, the group for a container.
    pub fn open(
        function: &HostFunction,
        iommu: Arc<Iommu>,
        node: Option<File>,
    ) -> Result<Self, VfioError> {
        let address = function.address;
        function.check_usable()?;
        let (owner, file) = match &*iommu {
            Iommu::Iommufd(iommufd) => {
                let device = match node {
                    Some(node) => VfioDevice::new_from_fd(node, iommufd.clone(), true),
                    None => VfioDevice::new(&function.path, iommufd.clone(), true),
                };
                let device = device.map_err(|error| open_error(function, error))?;
                let file = duplicate(&device)?;
                (Owner::Node(device), file)
            }
            Iommu::Container(container) => {
                let (device, group) = container.device(function, node)?;
                (Owner::Group(group), device)
            }
        };
        // A region that the kernel refuses does not exist.
        let region = |index| {
            let none = RegionInfo {
                index,
                ..Default::default()
            };
            ioctls::region(&file, index).unwrap_or(none)
        };
        let open = Self {
            address,
            iommu,
            regions: (0..REGIONS).map(region).collect(),
            owner: ManuallyDrop::new(owner),
            file: ManuallyDrop::new(Arc::new(file)),
            request: EventFd::new(EFD_NONBLOCK).map_err(|source| VfioError::Host {
                action: "make an event descriptor",
                source,
            })?,
        };
        // Old kernels cannot request a device: they remove it without.
        if let Err(error) =
            ioctls::trigger_events(&open, VFIO_PCI_REQ_IRQ_INDEX, 0, &[Some(&open.request)])
        {
            tracing::debug!(%error, %address, "the host cannot ask for this device");
        }
        open.check_alive()?;
        Ok(open)
    }

    /// A device that has fallen off its bus reads as ones.
    fn check_alive(&self) -> Result<(), VfioError> {
        let broken = |what: String| VfioError::Broken {
            address: self.address,
            what,
        };
        let mut vendor = [0; 2];
        self.read(VFIO_PCI_CONFIG_REGION_INDEX, 0, &mut vendor)
            .map_err(|error| broken(format!("its configuration space cannot be read ({error})")))?;
        if vendor == [0xff; 2] {
            return Err(broken("it answers nothing".into()));
        }
        Ok(())
    }

    /// The device's descriptor.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Signalled when the host requests the device back: its driver is being unbound, or it is being removed.
    pub fn request(&self) -> &EventFd {
        &self.request
    }

    /// Whether the host has requested the device since the last call.
    pub fn take_request(&self) -> bool {
        self.request.read().is_ok()
    }

    /// Region `index`, below [`REGIONS`]; an empty one if there is none.
    pub fn region(&self, index: u32) -> RegionInfo {
        let region = self.regions.get(index as usize).cloned();
        region.unwrap_or_default()
    }

    /// Number of interrupts of kind `index`, and whether single ones can be added while others are on.
    pub fn interrupts(&self, index: u32) -> (u32, bool) {
        match ioctls::irq_info(self, index) {
            Ok((flags, count)) if flags & VFIO_IRQ_INFO_EVENTFD != 0 => {
                (count, flags & VFIO_IRQ_INFO_NORESIZE == 0)
            }
            _ => (0, false),
        }
    }

    /// Reads all of `data` at `offset` of region `index`.
    pub fn read(&self, index: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let at = self.place(index, offset, data.len())?;
        self.file.read_exact_at(data, at)
    }

    /// Writes all of `data` at `offset` of region `index`.
    pub fn write(&self, index: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = self.place(index, offset, data.len())?;
        self.file.write_all_at(data, at)
    }

    fn place(&self, index: u32, offset: u64, len: usize) -> io::Result<u64> {
        let region = self.regions.get(index as usize);
        region
            .filter(|region| {
                let end = offset.checked_add(len as u64);
                end.is_some_and(|end| end <= region.size)
            })
            .and_then(|region| region.start.checked_add(offset))
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Resets the function, if it can be.
    pub fn reset(&self) -> io::Result<()> {
        ioctls::reset(self)
    }
}

impl AsRawFd for HostDevice {
    fn as_raw_fd(&self) -> i32 {
        self.file.as_raw_fd()
    }
}

impl AsFd for HostDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for HostDevice {
    /// vfio-ioctls panics if it cannot detach a device, as when the device no longer wakes up. Such a device is
    /// only closed: the kernel does the rest. What vfio-ioctls keeps of it stays until the process ends.
    fn drop(&mut self) {
        let in_order = match &*self.owner {
            Owner::Node(device) => device.detach_hwpt().is_ok(),
            Owner::Group(_) => true,
        };
        // SAFETY: `file` is not used after this. It goes first: a group with an open device stays in its container.
        unsafe { ManuallyDrop::drop(&mut self.file) };
        match &*self.owner {
            Owner::Node(device) if !in_order => {
                tracing::warn!(address = %self.address, "a device that does not answer is let go");
                // SAFETY: the descriptor is not used after this: its owner is never dropped.
                unsafe { libc::close(device.as_raw_fd()) };
            }
            // SAFETY: `owner` is not used after this.
            _ => unsafe { ManuallyDrop::drop(&mut self.owner) },
        }
    }
}

fn duplicate(device: &VfioDevice) -> Result<File, VfioError> {
    // SAFETY: the descriptor is open for as long as `device` is borrowed.
    let borrowed = unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) };
    let copy = borrowed.try_clone_to_owned();
    copy.map(File::from).map_err(|source| VfioError::Host {
        action: "duplicate a descriptor",
        source,
    })
}

impl HostFunction {
    /// Checks what the user can fix, before the kernel only says EINVAL.
    pub fn check_usable(&self) -> Result<(), VfioError> {
        let driver = self.driver();
        if driver.as_deref() != Some(VFIO_PCI) {
            return Err(VfioError::NotBound {
                address: self.address,
                driver,
            });
        }
        match self.group() {
            Some(_) => Ok(()),
            None => Err(VfioError::NoIommu(self.address)),
        }
    }
}

/// The error of the library, with what to do about it.
fn open_error(function: &HostFunction, error: vfio_ioctls::VfioError) -> VfioError {
    use vfio_ioctls::VfioError as Library;
    let address = function.address;
    let group = function.group().unwrap_or_default();
    let others = others_in_group(function);
    let not_viable = || VfioError::NotViable {
        address,
        group,
        others: others.clone(),
    };
    let action = match &error {
        Library::OpenDeviceCdev(source) => match (source.kind(), function.character_device()) {
            (io::ErrorKind::PermissionDenied, Some(node)) => return VfioError::Permission(node),
            (io::ErrorKind::NotFound, Some(path)) => {
                return VfioError::NoNode {
                    path,
                    hint: "the system's device manager has not made it; check /dev is mounted here",
                };
            }
            (io::ErrorKind::ResourceBusy, _) => return VfioError::Busy(address),
            _ => "open it",
        },
        Library::InvalidVfioDev => {
            return VfioError::NoNode {
                path: "/dev/vfio/devices".into(),
                hint: "this kernel has no VFIO device nodes; do not set iommufd, or use a kernel built with \
                       CONFIG_VFIO_DEVICE_CDEV",
            };
        }
        Library::VfioDeviceBindIommufd(_) => match errno(&error) {
            Some(libc::EBUSY | libc::EINVAL) if !others.is_empty() => return not_viable(),
            Some(libc::EBUSY | libc::EINVAL) => return VfioError::Busy(address),
            Some(libc::EPERM) => return VfioError::UnsafeInterrupts,
            _ => "bind it to iommufd",
        },
        _ => "take it",
    };
    VfioError::Library {
        address,
        action,
        source: error,
    }
}
