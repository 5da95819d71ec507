//! Interrupt routing: pins of the IOAPIC and message-signalled vectors, both raised by irqfd.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd, BorrowedFd},
    sync::{Arc, MutexGuard},
};

use fanlight_devices::{
    hypervisor::{LevelIrq, MsiMessage, MsiVector},
    sync::Mutex,
};
use kvm_bindings::{
    KVM_CAP_X2APIC_API, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, KvmIrqRouting,
    kvm_enable_cap, kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::VmFd;
use rustix::event::{PollFd, PollFlags, Timespec};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{KvmError, io_error, ioctl};

/// Pins of KVM's IOAPIC; their GSIs are the same numbers.
const IOAPIC_PINS: u32 = 24;
/// Where messages to local APICs go; the destination is in bits 12 to 19.
const MSI_ADDRESS: u32 = 0xfee0_0000;
/// The delivery mode of non-maskable interrupts, in bits 8 to 10 of a message.
const MSI_DELIVERY_NMI: u32 = 0b100 << 8;
/// GSIs that KVM routes (`KVM_MAX_IRQ_ROUTES` on x86).
const MAX_GSIS: u32 = 4096;

/// Makes message routes carry destination ids above 255 (`Documentation/virt/kvm/api.rst`, 7.9).
pub fn enable_x2apic_ids(vm: &VmFd) -> Result<(), KvmError> {
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_X2APIC_API,
        ..Default::default()
    };
    cap.args[0] = u64::from(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK);
    vm.enable_cap(&cap).map_err(ioctl("use x2APIC ids"))
}

/// The machine's interrupt routes.
#[derive(Debug)]
pub struct Interrupts {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
}

#[derive(Debug)]
struct Routes {
    /// Routes of messages, by GSI.
    messages: BTreeMap<u32, MsiMessage>,
    /// GSIs above the pins that no vector owns.
    free: Vec<u32>,
    /// The lowest GSI that was never in use.
    next: u32,
}

impl Interrupts {
    /// Routes the pins of the IOAPIC.
    pub fn new(vm: Arc<VmFd>) -> Result<Self, KvmError> {
        let interrupts = Self {
            vm,
            routes: Mutex::new(Routes {
                messages: BTreeMap::new(),
                free: Vec::new(),
                next: IOAPIC_PINS,
            }),
        };
        interrupts
            .apply(&interrupts.lock())
            .map_err(|source| KvmError::Ioctl {
                action: "route interrupts",
                source,
            })?;
        Ok(interrupts)
    }

    /// Raises a non-maskable interrupt at the vCPU whose APIC id is `id`, by a message like that of a device. The
    /// address has the low byte and the high bytes of the id, the data the delivery mode (Intel SDM volume 3, 11.11).
    pub fn raise_nmi(&self, id: u32) -> Result<(), KvmError> {
        self.vm
            .signal_msi(kvm_msi {
                address_lo: MSI_ADDRESS | (id & 0xff) << 12,
                address_hi: id & !0xff,
                data: MSI_DELIVERY_NMI,
                ..Default::default()
            })
            .map(drop)
            .map_err(ioctl("raise a non-maskable interrupt"))
    }

    fn lock(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock()
    }

    /// Sets the whole routing table: KVM has no call for single entries.
    fn apply(&self, routes: &Routes) -> io::Result<()> {
        let pins = (0..IOAPIC_PINS).map(|pin| {
            let mut entry = kvm_irq_routing_entry {
                gsi: pin,
                type_: KVM_IRQ_ROUTING_IRQCHIP,
                ..Default::default()
            };
            entry.u.irqchip = kvm_irq_routing_irqchip {
                irqchip: KVM_IRQCHIP_IOAPIC,
                pin,
            };
            entry
        });
        let messages = routes.messages.iter().map(|(&gsi, message)| {
            let mut entry = kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                ..Default::default()
            };
            entry.u.msi = kvm_irq_routing_msi {
                address_lo: message.address as u32,
                address_hi: (message.address >> 32) as u32,
                data: message.data,
                ..Default::default()
            };
            entry
        });
        let entries: Vec<_> = pins.chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|error| io::Error::other(format!("{error:?}")))?;
        self.vm.set_gsi_routing(&table).map_err(io_error)
    }

    /// An event descriptor on a pin of the IOAPIC.
    pub fn line(&self, gsi: u32) -> io::Result<EventFd> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        self.vm.register_irqfd(&event, gsi).map_err(io_error)?;
        Ok(event)
    }

    /// Event descriptors on a pin of the IOAPIC that stays raised until the guest has handled the interrupt.
    pub fn level(&self, gsi: u32) -> io::Result<LevelIrq> {
        let irq = LevelIrq {
            trigger: EventFd::new(EFD_NONBLOCK)?,
            resample: EventFd::new(EFD_NONBLOCK)?,
        };
        self.vm
            .register_irqfd_with_resample(&irq.trigger, &irq.resample, gsi)
            .map_err(io_error)?;
        Ok(irq)
    }

    /// A new vector, masked.
    pub fn vector(this: &Arc<Self>) -> io::Result<Vector> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        let mut routes = this.lock();
        let gsi = match routes.free.pop() {
            Some(gsi) => gsi,
            None if routes.next < MAX_GSIS => {
                routes.next += 1;
                routes.next - 1
            }
            None => {
                return Err(io::Error::new(
                    io::ErrorKind::QuotaExceeded,
                    format!("all {MAX_GSIS} interrupt routes of the machine are in use"),
                ));
            }
        };
        drop(routes);
        Ok(Vector {
            interrupts: this.clone(),
            gsi,
            event,
            attached: Mutex::new(false),
        })
    }
}

/// A message-signalled vector.
#[derive(Debug)]
pub struct Vector {
    interrupts: Arc<Interrupts>,
    gsi: u32,
    event: EventFd,
    /// Whether KVM listens to `event`.
    attached: Mutex<bool>,
}

impl MsiVector for Vector {
    fn unmask(&self, message: MsiMessage) -> io::Result<()> {
        let mut attached = self.attached.lock();
        let mut routes = self.interrupts.lock();
        if routes.messages.get(&self.gsi) != Some(&message) {
            let old = routes.messages.insert(self.gsi, message);
            if let Err(error) = self.interrupts.apply(&routes) {
                // KVM refuses the message that the guest wrote: keep the one before.
                match old {
                    Some(old) => routes.messages.insert(self.gsi, old),
                    None => routes.messages.remove(&self.gsi),
                };
                return Err(error);
            }
        }
        drop(routes);
        if !*attached {
            // KVM polls the descriptor as it attaches, so that a pending interrupt is delivered.
            self.interrupts
                .vm
                .register_irqfd(&self.event, self.gsi)
                .map_err(io_error)?;
            *attached = true;
        }
        Ok(())
    }

    fn mask(&self) -> io::Result<()> {
        let mut attached = self.attached.lock();
        if *attached {
            self.interrupts
                .vm
                .unregister_irqfd(&self.event, self.gsi)
                .map_err(io_error)?;
            *attached = false;
        }
        Ok(())
    }

    fn is_pending(&self) -> bool {
        // SAFETY: `self.event` is open for as long as the borrow, which ends with this function.
        let event = unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) };
        let mut fds = [PollFd::new(&event, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready != 0)
    }

    fn event(&self) -> &EventFd {
        &self.event
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        if let Err(error) = self.mask() {
            tracing::error!(%error, gsi = self.gsi, "cannot detach an interrupt");
        }
        let mut routes = self.interrupts.lock();
        routes.messages.remove(&self.gsi);
        routes.free.push(self.gsi);
    }
}
