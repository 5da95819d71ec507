//! Passthrough of PCI devices by VFIO (Linux `Documentation/driver-api/vfio.rst`).
//!
//! [`HostDevice`] is the open device, kept over resets of the machine. [`VfioFunction`] is the PCI function that
//! the guest sees, made anew after each reset. [`Iommu`] bounds what the devices reach: guest RAM, BARs of each
//! other, and the blobs of [`crate::dma`].

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
