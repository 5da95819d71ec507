//! The machine: built of what [`crate::host`] opened, run, reset and ended.

pub mod ending;
pub mod error;
pub mod graphics;
pub mod host_requests;
pub mod machine;
pub mod passthrough;
pub mod pci_topology;
mod vcpus;
