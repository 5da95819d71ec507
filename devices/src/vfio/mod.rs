//! Passthrough of PCI devices of the host's, by VFIO (Linux `Documentation/driver-api/vfio.rst`).
//!
//! [`HostDevice`] is the device as the host has it, kept over resets of the machine; [`VfioFunction`] is
//! the PCI function that the guest sees of it, made anew for each life. [`Iommu`] bounds what the devices
//! reach: guest RAM, each other's memory where the guest sees it, and what [`DeviceReach`] has of other devices'.

mod config;
mod container;
mod container_ioctls;
mod device;
pub mod dmabuf;
mod error;
mod host;
mod interrupts;
mod ioctls;
mod iommu;
mod p2p;
mod reach;
mod regions;
pub mod sysfs;

pub use container::Container;
pub use device::VfioFunction;
pub use error::VfioError;
pub use host::{HostDevice, others_in_group};
pub use ioctls::RegionInfo;
pub use iommu::{DmaMapping, Iommu, covers};
#[cfg(test)]
pub(crate) use reach::test_util;
pub use reach::{DeviceReach, DmaSpace, Reachable, Source};
