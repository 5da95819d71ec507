//! Programs that run inside guests, as subcommands of `guest-agent`.

pub mod bad_driver;
pub mod decoding;
pub mod device_check;
pub mod drm;
pub mod edu;
pub mod evdev;
pub mod graphics;
pub mod guest_draw;
pub mod masked_vector;
pub mod noiommu;
pub mod raw_gpu;
pub mod show_pattern;
