//! What both sides of a test use: conversations, PCI functions in sysfs, and the pictures that one draws and the
//! other expects.

pub mod echo;
pub mod edu;
pub mod pci;
pub mod pci_description;
pub mod pixel_formats;
pub mod test_pattern;
