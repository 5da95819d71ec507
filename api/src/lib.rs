//! The types by which people and programs describe a machine: the command line, `--config` files
//! and Rust programs share them. Knows neither KVM nor any device.

pub mod config;
pub mod size;
pub mod spec;

pub use config::{
    CharBackend, ConsoleConfig, DiskConfig, DiskFormat, Iommufd, KernelUnpack, MemoryConfig,
    NetConfig, OnPanic, OnReset, RngConfig, VfioConfig, VmConfig, VsockConfig,
};
pub use size::ByteSize;
