//! Typed system calls and raw kernel structures, one file a kernel interface.

pub mod file_kind;
mod ioctl;
pub mod iommufd;
mod iova_range;
pub mod memfd;
pub mod reservation;
pub mod thp_alignment;
pub mod udmabuf;
pub mod vfio;
pub mod vfio_container;
