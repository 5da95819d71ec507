//! The machine: built of what [`crate::host`] opened, run, reset and ended.

mod boot;
pub mod devices;
pub mod ending;
pub mod error;
pub mod fault;
mod function;
pub mod guest_console;
pub mod hotplug;
pub mod machine;
pub mod pci_topology;
mod platform;
mod processors;
pub mod resources;
mod vcpus;
