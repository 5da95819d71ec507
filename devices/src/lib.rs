//! Everything a guest sees besides its vCPUs: memory, PCI, virtio devices and the few legacy ones.
//!
//! A device knows guest memory ([`GuestMemory`]), what it may ask of the hypervisor
//! ([`hypervisor::Hypervisor`]) and its own host resources. It knows no KVM ioctl, no command line
//! and no other device.

pub mod dma;
pub mod dmabuf;
pub mod hypervisor;
pub mod legacy;
pub mod memory;
pub mod pci;
pub mod sync;
mod sys;
pub mod vfio;
pub mod virtio;

/// Guest RAM as devices read and write it. Cloning shares the mappings.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// An error and its causes as one line.
pub fn error_line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        source = cause.source();
    }
    line.replace('\n', " ")
}
