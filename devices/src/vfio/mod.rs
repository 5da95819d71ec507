//! Passthrough of PCI devices of the host's, by VFIO (Linux `Documentation/driver-api/vfio.rst`).
//!
//! [`HostDevice`] is the device as the host has it, kept over resets of the machine; [`VfioFunction`] is
//! the PCI function that the guest sees of it, made anew for each life. [`Iommu`] bounds what the devices
//! reach: guest RAM, each other's memory where the guest sees it, and what [`crate::dma`] has of other devices'.

mod config;
mod container;
mod error;
mod function;
mod host_device;
mod interrupts;
mod iommu;
mod p2p;
mod regions;
pub mod sysfs;

pub use crate::sys::vfio::RegionInfo;
pub use container::Container;
pub use error::VfioError;
pub use function::VfioFunction;
pub use host_device::HostDevice;
pub use iommu::{DmaMapping, Iommu, covers};
