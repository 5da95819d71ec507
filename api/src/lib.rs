//! The types by which people and programs describe a machine: the command line, `--config` files
//! and Rust programs share them. Knows neither KVM nor any device.

pub mod config;
pub mod gpu;
pub mod size;
pub mod spec;

pub use config::{
    CharBackend, ConsoleConfig, DiskConfig, DiskFormat, KernelUnpack, MemoryConfig, NetConfig,
    OnPanic, OnReset, RngConfig, VmConfig, VsockConfig,
};
pub use gpu::{GpuConfig, OutputMode};
pub use size::ByteSize;
