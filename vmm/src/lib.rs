//! Puts a machine together out of its parts and runs it: KVM, vCPUs, devices, consoles, the life of a
//! machine from start to end.

pub mod console;
pub mod doctor;
pub mod host_devices;
pub mod kvm;
pub mod lifecycle;
pub mod machine;
pub mod passthrough;
pub mod resources;
pub mod status;
pub mod terminal;
mod vcpus;
