//! The machine: built of what [`crate::host`] opened, run, reset and ended.

pub mod ending;
pub mod graphics;
pub mod host_requests;
pub mod machine;
pub mod passthrough;
pub mod pci_topology;
pub mod run_loop;
mod vcpus;
