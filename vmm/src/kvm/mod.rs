//! The virtual machine in KVM: every ioctl on `/dev/kvm` and its descriptors, and the hypervisor that devices use.

mod interrupts;
mod slots;
mod vcpu;
mod vfio;

use std::{
    io,
    os::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd},
    path::Path,
    sync::Arc,
};

use fanlight_arch::layout;
use fanlight_devices::{
    hypervisor::{AddedDevice, Hypervisor, LevelIrq, MappedSlot, MsiVector},
    memory::SlotMapping,
    sync::Mutex,
};
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_DISABLE_QUIRKS2, KVM_MAX_CPUID_ENTRIES, kvm_clock_data,
    kvm_enable_cap,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

pub use vcpu::{Exit, ExitCounts, KvmVcpu, VcpuError, catch_kicks, kick_signal};

use interrupts::Interrupts;
use slots::Slots;
use vfio::VfioDevices;

/// Why there is no virtual machine.
#[derive(Debug, Error)]
pub enum KvmError {
    /// There is no device node.
    #[error(
        "no /dev/kvm: load the module kvm_intel or kvm_amd (virtualization must be enabled in the \
         firmware), or use a host that has it"
    )]
    Missing,
    /// The process has no permission on the device node.
    #[error("no permission on /dev/kvm: join its group, `usermod -aG kvm $USER`, and log in again")]
    Permission,
    /// The descriptor is not of `/dev/kvm`.
    #[error("the descriptor given for /dev/kvm is not of it")]
    NotKvm,
    /// Not the version of the interface that Linux has had since 2.6.22.
    #[error(
        "/dev/kvm speaks version {0} of its interface, not {KVM_API_VERSION}: update the host's kernel"
    )]
    Version(i32),
    /// A capability that Fanlight needs is missing.
    #[error("this host's KVM lacks {0}: update the host's kernel")]
    Capability(&'static str),
    /// More vCPUs than KVM runs.
    #[error("{asked} vCPUs: this host's KVM runs 1 to {max}")]
    Cpus {
        /// What was asked for.
        asked: u32,
        /// What KVM runs at most.
        max: u32,
    },
    /// An ioctl failed.
    #[error("KVM cannot {action}")]
    Ioctl {
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// KVM ignores the guest's PAT (Linux `arch/x86/include/uapi/asm/kvm.h`).
const KVM_X86_QUIRK_IGNORE_GUEST_PAT: i32 = 1 << 9;

/// Names the ioctl that failed.
fn ioctl(action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Ioctl {
        action,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}

/// Capabilities that Fanlight needs, with their names for people.
const REQUIRED: [(Cap, &str); 7] = [
    (Cap::Irqchip, "an in-kernel interrupt controller"),
    (Cap::Irqfd, "irqfd"),
    (Cap::IrqRouting, "interrupt routing"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::UserMemory, "user memory slots"),
    (Cap::ImmediateExit, "immediate_exit"),
    (Cap::ExtCpuid, "extended CPUID"),
];

/// A virtual machine without vCPUs, with its interrupt controllers.
#[derive(Debug)]
pub struct KvmVm {
    kvm: Kvm,
    vm: Arc<VmFd>,
    interrupts: Arc<Interrupts>,
    slots: Arc<Slots>,
    /// Locked while the ring of coalesced accesses is read; none if KVM does not coalesce ports.
    coalesced: Option<Arc<Mutex<()>>>,
    vfio: VfioDevices,
}

impl KvmVm {
    /// Creates a machine for `cpus` vCPUs, on `/dev/kvm` if it is not given open.
    pub fn new(cpus: u32, device: Option<OwnedFd>) -> Result<Self, KvmError> {
        let kvm = open(device)?;
        let max = u32::try_from(kvm.get_max_vcpus())
            .unwrap_or(u32::MAX)
            .min(layout::MAX_CPUS);
        if cpus == 0 || cpus > max {
            return Err(KvmError::Cpus { asked: cpus, max });
        }
        if let Some((_, name)) = REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(KvmError::Capability(name));
        }
        let slots = kvm.get_nr_memslots();
        let vm = Arc::new(kvm.create_vm().map_err(ioctl("create a virtual machine"))?);
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(ioctl("place the identity map"))?;
        vm.set_tss_address(layout::KVM_TSS as usize)
            .map_err(ioctl("place the task state segment"))?;
        vm.create_irq_chip()
            .map_err(ioctl("create the interrupt controllers"))?;
        interrupts::enable_x2apic_ids(&vm)?;
        let interrupts = Arc::new(Interrupts::new(vm.clone())?);
        Ok(Self {
            interrupts,
            slots: Arc::new(Slots::new(vm.clone(), slots)),
            coalesced: kvm.check_extension(Cap::CoalescedPio).then(Arc::default),
            vfio: VfioDevices::new(vm.clone()),
            vm,
            kvm,
        })
    }

    /// The CPUID leaves that this host can give a guest.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(ioctl("tell which CPUID leaves it supports"))
    }

    /// Whether KVM emulates the local APIC's TSC deadline mode, which CPUID does not tell.
    pub fn has_tsc_deadline(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// Creates the vCPU whose APIC id is `id`.
    pub fn create_vcpu(&self, id: u32) -> Result<KvmVcpu, KvmError> {
        let fd = self
            .vm
            .create_vcpu(u64::from(id))
            .map_err(ioctl("create a vCPU"))?;
        KvmVcpu::new(fd, self.coalesced.clone())
    }

    /// Raises a non-maskable interrupt at the vCPU whose APIC id is `id`.
    pub fn raise_nmi(&self, id: u32) -> Result<(), KvmError> {
        self.interrupts.raise_nmi(id)
    }

    /// Honours the guest's memory types on Intel hosts, where KVM otherwise makes all memory write-back
    /// (`KVM_X86_QUIRK_IGNORE_GUEST_PAT`): the memory of a passed-through GPU must be write-combined. Does nothing on
    /// hosts without the quirk.
    pub fn honour_guest_pat(&self) -> Result<(), KvmError> {
        let quirks = self.kvm.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into());
        if quirks & KVM_X86_QUIRK_IGNORE_GUEST_PAT == 0 {
            return Ok(());
        }
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_DISABLE_QUIRKS2,
            ..Default::default()
        };
        cap.args[0] = KVM_X86_QUIRK_IGNORE_GUEST_PAT as u64;
        self.vm
            .enable_cap(&cap)
            .map_err(ioctl("honour the guest's memory types"))
    }

    /// The current values of the guest's clocks. No vCPU may run.
    pub fn clock(&self) -> Result<ClockState, KvmError> {
        let clock = self
            .vm
            .get_clock()
            .map_err(ioctl("tell the guest's clock"))?;
        Ok(ClockState {
            nanoseconds: clock.clock,
            host_cycles: host_cycles(),
        })
    }

    /// Sets the paravirtual clock back to an earlier value. No vCPU may run.
    pub fn set_clock(&self, state: &ClockState) -> Result<(), KvmError> {
        let clock = kvm_clock_data {
            clock: state.nanoseconds,
            ..Default::default()
        };
        self.vm
            .set_clock(&clock)
            .map_err(ioctl("set the guest's clock"))
    }

    /// Coalesces the guest's writes to a port (`KVM_CAP_COALESCED_PIO`): they cause no exit before the next access to
    /// another port. A PCI configuration access has one exit instead of two. Does nothing on hosts without it.
    pub fn coalesce_port(&self, port: u16, len: u32) -> Result<(), KvmError> {
        if self.coalesced.is_none() {
            return Ok(());
        }
        self.vm
            .register_coalesced_mmio(IoEventAddress::Pio(u64::from(port)), len)
            .map_err(ioctl("coalesce a port"))
    }
}

/// The clocks of a paused machine.
#[derive(Clone, Copy, Debug)]
pub struct ClockState {
    /// The paravirtual clock.
    nanoseconds: u64,
    /// The host's time stamp counter when the clock was read.
    host_cycles: u64,
}

impl ClockState {
    /// Cycles of the host's time stamp counter since.
    pub fn cycles_since(&self) -> u64 {
        host_cycles().wrapping_sub(self.host_cycles)
    }
}

fn host_cycles() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux lets user space use it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn open(device: Option<OwnedFd>) -> Result<Kvm, KvmError> {
    let opened = match device {
        // SAFETY: the descriptor is open and given away. One that is not of KVM fails its first ioctl.
        Some(device) => Ok(unsafe { Kvm::from_raw_fd(device.into_raw_fd()) }),
        None => Kvm::new(),
    };
    let kvm = opened.map_err(|error| {
        let source = io::Error::from_raw_os_error(error.errno());
        match source.kind() {
            io::ErrorKind::NotFound => KvmError::Missing,
            io::ErrorKind::PermissionDenied => KvmError::Permission,
            _ => KvmError::Ioctl {
                action: "be opened",
                source,
            },
        }
    })?;
    match kvm.get_api_version() {
        ..0 => Err(KvmError::NotKvm),
        version if version == KVM_API_VERSION as i32 => Ok(kvm),
        version => Err(KvmError::Version(version)),
    }
}

/// Whether the host's processor has virtualization. A paravirtual KVM creates machines without it, and fails on a
/// stock kernel with an emulation error.
pub fn processor_virtualizes() -> bool {
    has_virtualization_flag(Path::new("/proc/cpuinfo"))
}

fn has_virtualization_flag(cpuinfo: &Path) -> bool {
    std::fs::read_to_string(cpuinfo).is_ok_and(|text| {
        text.lines()
            .find(|line| line.starts_with("flags"))
            .is_some_and(|line| line.split_whitespace().any(|f| f == "vmx" || f == "svm"))
    })
}

impl Hypervisor for KvmVm {
    fn irq_line(&self, gsi: u32) -> io::Result<EventFd> {
        self.interrupts.line(gsi)
    }

    fn level_irq(&self, gsi: u32) -> io::Result<LevelIrq> {
        self.interrupts.level(gsi)
    }

    fn msi_vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        Ok(Arc::new(Interrupts::vector(&self.interrupts)?))
    }

    fn add_doorbell(&self, gpa: u64, event: &EventFd) -> io::Result<()> {
        self.vm
            .register_ioevent(event, &IoEventAddress::Mmio(gpa), NoDatamatch)
            .map_err(io_error)
    }

    fn remove_doorbell(&self, gpa: u64, event: &EventFd) -> io::Result<()> {
        self.vm
            .unregister_ioevent(event, &IoEventAddress::Mmio(gpa), NoDatamatch)
            .map_err(io_error)
    }

    fn map_slot(&self, mapping: SlotMapping) -> io::Result<MappedSlot> {
        Slots::map(&self.slots, mapping)
    }

    fn add_vfio_device(&self, device: BorrowedFd<'_>) -> io::Result<AddedDevice> {
        self.vfio.add(device)
    }
}

fn io_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_flag_must_be_a_word_of_the_flags_line() {
        let cases = [
            ("model name\t: vmx\nflags\t\t: fpu svm_lock\n", false),
            ("flags\t\t: fpu svm sse\n", true),
            ("flags\t\t: fpu vmx\n", true),
            ("", false),
        ];
        for (text, expected) in cases {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(text.as_bytes()).unwrap();
            assert_eq!(has_virtualization_flag(file.path()), expected, "{text}");
        }
    }
}
