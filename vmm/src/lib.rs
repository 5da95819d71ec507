//! Puts a machine together out of its parts and runs it: KVM, vCPUs, devices, consoles, the life of a
//! machine from start to end.

pub mod console;
pub mod desk;
pub mod display;
pub mod doctor;
pub mod files;
mod footprint;
pub mod graphics;
pub mod host_devices;
pub mod host_requests;
pub mod input;
pub mod inventory;
pub mod kvm;
pub mod lifecycle;
pub mod machine;
pub mod passthrough;
pub mod renderer;
pub mod resources;
pub mod serve;
pub mod signals;
pub mod status;
pub mod terminal;
mod vcpus;
pub mod view;
