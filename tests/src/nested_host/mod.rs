//! The nested host: a KVM host for machines that have none. QEMU emulates an AMD processor with SVM; Linux in it
//! (L1) has a real KVM, and runs the tests, whose guests are L2.

mod apt;
mod build;
mod cache;
mod command;
pub mod cpu_watchdog;
mod drivers;
mod graphics_stack;
mod guest_module;
mod initramfs;
mod kernel;
mod kernel_build;
mod machine;
mod modules;
mod packages;

pub use build::{build_program, checkout, program_under_test};
pub use cache::Cache;
pub use command::run as run_command;
pub use drivers::Drivers;
pub use graphics_stack::GraphicsStack;
pub use guest_module::guest_module;
pub use initramfs::{Archive, guest_archive};
pub use kernel::{BuiltKernel, built_kernel};
pub use machine::{L1Device, L1Kernel, NestedHost, Running, Share};
pub use modules::Modules;
pub use packages::{ApiClients, Busybox, DebianPrograms, Emulator, StockKernel};
