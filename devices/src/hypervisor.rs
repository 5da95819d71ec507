//! What devices ask of the hypervisor: interrupts, doorbells and memory slots.
//!
//! The machine implements these traits on KVM; unit tests implement them with counters.

use std::{fmt, io, os::fd::BorrowedFd, sync::Arc};

use vmm_sys_util::eventfd::EventFd;

use crate::memory::SlotMapping;

/// What a device asks of its virtual machine.
pub trait Hypervisor: Send + Sync + fmt::Debug {
    /// Connects an event descriptor to pin `gsi` of the IOAPIC: each write to it is one edge.
    fn irq_line(&self, gsi: u32) -> io::Result<EventFd>;

    /// Connects a pin of the IOAPIC for a level-triggered interrupt of a passed-through device
    /// (`KVM_IRQFD_FLAG_RESAMPLE`).
    fn level_irq(&self, gsi: u32) -> io::Result<LevelIrq>;

    /// Makes a message-signalled interrupt, masked until [`MsiVector::unmask`].
    fn msi_vector(&self) -> io::Result<Arc<dyn MsiVector>>;

    /// Lets guest writes of any value and width at `gpa` signal `event` without an exit to user space
    /// (`KVM_IOEVENTFD`).
    fn add_doorbell(&self, gpa: u64, event: &EventFd) -> io::Result<()>;

    /// Undoes [`Hypervisor::add_doorbell`] with the same arguments.
    fn remove_doorbell(&self, gpa: u64, event: &EventFd) -> io::Result<()>;

    /// Shows a host mapping to the guest (`KVM_SET_USER_MEMORY_REGION`) until the result is dropped.
    fn map_slot(&self, mapping: SlotMapping) -> io::Result<MappedSlot>;

    /// Registers a passed-through device with KVM (`KVM_DEV_VFIO_FILE_ADD`). It decides whether the guest can do
    /// DMA that bypasses caches.
    fn add_vfio_device(&self, device: BorrowedFd<'_>) -> io::Result<AddedDevice>;
}

/// An interrupt line that several devices may share.
#[derive(Debug)]
pub struct LevelIrq {
    /// Raises the line.
    pub trigger: EventFd,
    /// Signalled when the guest has handled the interrupt, which lowers the line. A device that still needs
    /// attention raises it again.
    pub resample: EventFd,
}

/// Address and data of a message-signalled interrupt (PCI 3.0, 6.8.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message Address with its upper half.
    pub address: u64,
    /// Message Data.
    pub data: u32,
}

/// One interrupt vector of a function, backed by an event descriptor.
///
/// While it is masked the descriptor is not attached to the interrupt controller and writes to it
/// accumulate: that is the Pending bit. Unmasking delivers what is pending.
pub trait MsiVector: Send + Sync + fmt::Debug {
    /// Routes the vector to `message` and attaches it. Also re-routes an unmasked vector.
    fn unmask(&self, message: MsiMessage) -> io::Result<()>;
    /// Detaches the vector. Does nothing to a masked one.
    fn mask(&self) -> io::Result<()>;
    /// Whether an interrupt waits for the vector to be unmasked.
    fn is_pending(&self) -> bool;
    /// The descriptor that raises the interrupt: devices write it, vhost and VFIO are given it.
    fn event(&self) -> &EventFd;
}

/// Removes a memory slot when dropped.
pub struct MappedSlot(Option<Box<dyn FnOnce() + Send + Sync>>);

impl MappedSlot {
    /// `unmap` runs once, when the slot is dropped.
    pub fn new(unmap: impl FnOnce() + Send + Sync + 'static) -> Self {
        Self(Some(Box::new(unmap)))
    }
}

impl Drop for MappedSlot {
    fn drop(&mut self) {
        if let Some(unmap) = self.0.take() {
            unmap();
        }
    }
}

impl fmt::Debug for MappedSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MappedSlot")
    }
}

/// Undoes [`Hypervisor::add_vfio_device`] when dropped.
#[derive(Debug)]
pub struct AddedDevice(#[expect(dead_code, reason = "held for its Drop")] MappedSlot);

impl AddedDevice {
    /// `remove` runs once, when the result is dropped.
    pub fn new(remove: impl FnOnce() + Send + Sync + 'static) -> Self {
        Self(MappedSlot::new(remove))
    }
}

#[cfg(any(test, feature = "test-util"))]
#[allow(missing_docs)]
pub(crate) mod test_util {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::sync::Mutex;

    /// A hypervisor that only remembers what it was asked for.
    #[derive(Debug, Default)]
    pub struct FakeHypervisor {
        vectors: Mutex<Vec<Arc<FakeVector>>>,
        /// Doorbells that are registered.
        pub doorbells: Mutex<Vec<u64>>,
        lines: AtomicUsize,
        slots: Arc<Mutex<Vec<(u64, u64)>>>,
    }

    impl FakeHypervisor {
        /// The memory slots: address and length.
        pub fn slots(&self) -> Vec<(u64, u64)> {
            self.slots.lock().clone()
        }

        /// Where each vector is routed to; `None` for a masked one.
        pub fn routes(&self) -> Vec<Option<MsiMessage>> {
            let vectors = self.vectors.lock();
            vectors.iter().map(|v| *v.route.lock()).collect()
        }
    }

    #[derive(Debug)]
    pub struct FakeVector {
        route: Mutex<Option<MsiMessage>>,
        event: EventFd,
    }

    impl Hypervisor for FakeHypervisor {
        fn irq_line(&self, _: u32) -> io::Result<EventFd> {
            self.lines
                .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            EventFd::new(0)
        }

        fn level_irq(&self, _: u32) -> io::Result<LevelIrq> {
            Ok(LevelIrq {
                trigger: EventFd::new(0)?,
                resample: EventFd::new(0)?,
            })
        }

        fn msi_vector(&self) -> io::Result<Arc<dyn MsiVector>> {
            let vector = Arc::new(FakeVector {
                route: Mutex::new(None),
                event: EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK)?,
            });
            self.vectors.lock().push(vector.clone());
            Ok(vector)
        }

        fn add_doorbell(&self, gpa: u64, _: &EventFd) -> io::Result<()> {
            self.doorbells.lock().push(gpa);
            Ok(())
        }

        fn remove_doorbell(&self, gpa: u64, _: &EventFd) -> io::Result<()> {
            self.doorbells.lock().retain(|&at| at != gpa);
            Ok(())
        }

        fn map_slot(&self, mapping: SlotMapping) -> io::Result<MappedSlot> {
            let slot = (mapping.gpa, mapping.len);
            self.slots.lock().push(slot);
            let slots = self.slots.clone();
            Ok(MappedSlot::new(move || {
                slots.lock().retain(|&other| other != slot);
            }))
        }

        fn add_vfio_device(&self, _: BorrowedFd<'_>) -> io::Result<AddedDevice> {
            Ok(AddedDevice::new(|| ()))
        }
    }

    impl MsiVector for FakeVector {
        fn unmask(&self, message: MsiMessage) -> io::Result<()> {
            *self.route.lock() = Some(message);
            Ok(())
        }

        fn mask(&self) -> io::Result<()> {
            *self.route.lock() = None;
            Ok(())
        }

        fn is_pending(&self) -> bool {
            let copy = self.event.try_clone().unwrap();
            let pending = copy.read();
            if let Ok(count) = pending {
                copy.write(count).unwrap();
            }
            pending.is_ok()
        }

        fn event(&self) -> &EventFd {
            &self.event
        }
    }
}
