//! The host's side of tests: guests, their displays, and benchmarks.

pub mod bench;
pub mod compositor;
pub mod device_nodes;
pub mod display;
pub mod dma_reader;
pub mod drawing_guest;
pub mod guest;
pub mod kvm_host;
pub mod l1_pool;
pub mod process_activity;
pub mod test_case;
pub mod test_process;
pub mod test_server;
pub mod tiny_kernel;
pub mod watcher;
