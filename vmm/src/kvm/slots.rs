//! KVM memory slots: which host mapping lies at which guest-physical address.

use std::{io, sync::Arc};

use fanlight_devices::{hypervisor::MappedSlot, memory::SlotMapping, sync::Mutex};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use super::io_error;

/// Allocates slot numbers and installs slots.
#[derive(Debug)]
pub struct Slots {
    vm: Arc<VmFd>,
    /// Which slot numbers are in use.
    used: Mutex<Vec<bool>>,
    max: usize,
}

impl Slots {
    /// A machine with at most `max` slots, none in use.
    pub fn new(vm: Arc<VmFd>, max: usize) -> Self {
        Self {
            vm,
            used: Mutex::new(Vec::new()),
            max,
        }
    }

    /// Shows `mapping` to the guest until the result is dropped.
    pub fn map(this: &Arc<Self>, mapping: SlotMapping) -> io::Result<MappedSlot> {
        let mut used = this.used.lock();
        let slot = match used.iter().position(|used| !used) {
            Some(slot) => slot,
            None if used.len() < this.max => {
                used.push(false);
                used.len() - 1
            }
            None => {
                return Err(io::Error::new(
                    io::ErrorKind::QuotaExceeded,
                    format!("all {} memory slots of the machine are in use", this.max),
                ));
            }
        };
        this.set(slot, Some(mapping))?;
        used[slot] = true;
        drop(used);
        let slots = this.clone();
        Ok(MappedSlot::new(move || {
            let mut used = slots.used.lock();
            match slots.set(slot, None) {
                Ok(()) => used[slot] = false,
                Err(error) => tracing::error!(%error, slot, "cannot remove a memory slot"),
            }
        }))
    }

    fn set(&self, slot: usize, mapping: Option<SlotMapping>) -> io::Result<()> {
        let mut region = kvm_userspace_memory_region {
            slot: slot as u32,
            ..Default::default()
        };
        if let Some(mapping) = mapping {
            region.guest_phys_addr = mapping.gpa;
            region.memory_size = mapping.len;
            region.userspace_addr = mapping.host;
            region.flags = if mapping.readonly {
                KVM_MEM_READONLY
            } else {
                0
            };
        }
        // SAFETY: a `SlotMapping` is a live host mapping while its slot exists (its contract), and
        // removing a slot touches no memory.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(io_error)
    }
}
