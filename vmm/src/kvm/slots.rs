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
    numbers: Mutex<Numbers>,
}

/// Slot numbers: the lowest free one is taken.
#[derive(Debug)]
struct Numbers {
    /// Which ones are in use.
    used: Vec<bool>,
    max: usize,
}

impl Numbers {
    /// A number that is free, and stays so until it is marked in `used`.
    fn free(&mut self) -> io::Result<usize> {
        match self.used.iter().position(|used| !used) {
            Some(slot) => Ok(slot),
            None if self.used.len() < self.max => {
                self.used.push(false);
                Ok(self.used.len() - 1)
            }
            None => Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                format!("all {} memory slots of the machine are in use", self.max),
            )),
        }
    }
}

impl Slots {
    /// A machine with at most `max` slots, none in use.
    pub fn new(vm: Arc<VmFd>, max: usize) -> Self {
        Self {
            vm,
            numbers: Mutex::new(Numbers {
                used: Vec::new(),
                max,
            }),
        }
    }

    /// Shows `mapping` to the guest until the result is dropped.
    pub fn map(this: &Arc<Self>, mapping: SlotMapping) -> io::Result<MappedSlot> {
        let mut numbers = this.numbers.lock();
        let slot = numbers.free()?;
        this.set(slot, Some(mapping))?;
        numbers.used[slot] = true;
        drop(numbers);
        let slots = this.clone();
        Ok(MappedSlot::new(move || {
            let mut numbers = slots.numbers.lock();
            match slots.set(slot, None) {
                Ok(()) => numbers.used[slot] = false,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_is_given_back_is_used_again() {
        let mut numbers = Numbers {
            used: Vec::new(),
            max: 2,
        };
        let take = |numbers: &mut Numbers| {
            let slot = numbers.free()?;
            numbers.used[slot] = true;
            Ok::<_, io::Error>(slot)
        };
        assert_eq!(take(&mut numbers).unwrap(), 0);
        assert_eq!(take(&mut numbers).unwrap(), 1);
        let error = take(&mut numbers).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded);
        numbers.used[0] = false;
        assert_eq!(take(&mut numbers).unwrap(), 0);
    }
}
