//! What an x86-64 machine needs to boot: address layout, kernel loading, CPUID, registers, ACPI tables.
//!
//! Nothing here knows a device model or KVM's ioctls: functions take guest memory and plain values
//! and give back bytes, register values or CPUID entries.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod layout;
pub mod regs;
pub mod reset_vector;

/// Guest RAM as the loader writes it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
