//! A virtual machine monitor in modules: host resources (`host`), the machine (`vm`) on KVM (`kvm`), its control API
//! (`control`), displays (`display`), 3D renderer (`renderer`), and the Wayland window (`viewer`).
//!
//! The program `fanlight` (`cli`) is a crate of its own on top of these; nothing here imports it.

pub mod control;
pub mod display;
pub mod host;
pub mod kvm;
pub mod renderer;
pub mod viewer;
pub mod vm;
