//! Types that describe and drive a machine, for the command line, `--config` files and the control API; the API's
//! framing, client and server. Knows neither KVM nor any device.
//!
//! `docs/src/guide/protocol.md` describes the protocol for clients in other languages.

pub mod client;
pub mod config;
pub mod display;
pub mod error;
pub mod gpu;
pub mod message;
pub mod methods;
pub mod or_fd;
pub mod schema;
pub mod server;
pub mod size;
pub mod socket;
pub mod spec;
pub mod stream;
pub mod types;

pub use config::{
    CharBackend, ConsoleConfig, DiskConfig, DiskFormat, Iommufd, KernelUnpack, MemoryConfig,
    NetConfig, OnPanic, OnReset, RngConfig, VfioConfig, VmConfig, VsockConfig,
};
pub use error::{ApiError, ErrorKind};
pub use gpu::{GpuConfig, OutputMode, Renderer};
pub use or_fd::{OrFd, PathOrFd};
pub use size::ByteSize;

/// Version of the API: major.minor.
pub const API_VERSION: &str = "1.0";
