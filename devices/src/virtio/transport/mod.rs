//! Virtio over PCI (Virtio 1.3, 4.1): modern only, MSI-X only, doorbells by ioeventfd.
//!
//! One 64-bit BAR holds everything: common configuration, ISR status, device configuration, doorbells,
//! MSI-X table and pending bits.

mod activation;
mod common_config;
mod doorbells;
mod function;
mod layout;
mod queues;
mod report;
mod shared_memory;
mod state;
#[cfg(test)]
mod tests;

pub use function::VirtioPciFunction;
pub use report::FunctionReport;
pub use shared_memory::SharedMemory;
