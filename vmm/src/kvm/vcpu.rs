//! One vCPU: its registers, and how its exits are handled.

use std::{
    cell::Cell,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use fanlight_arch::regs::InitialState;
use fanlight_devices::{memory::AddressSpace, sync::Mutex};
use kvm_bindings::{
    CpuId, KVM_EXIT_IO_OUT, KVM_INTERNAL_ERROR_EMULATION, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Msrs, kvm_device_attr,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use thiserror::Error;
use vmm_sys_util::{
    ioctl::ioctl_with_ref,
    signal::{SIGRTMIN, register_signal_handler},
};

use super::{KvmError, ioctl};

/// `KVM_SET_DEVICE_ATTR` and `KVM_GET_DEVICE_ATTR` of a vCPU, which kvm-ioctls has for other processors.
mod ioctls {
    use kvm_bindings::{KVMIO, kvm_device_attr};
    vmm_sys_util::ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    vmm_sys_util::ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
}
use ioctls::{KVM_GET_DEVICE_ATTR, KVM_SET_DEVICE_ATTR};

/// The attribute `KVM_VCPU_TSC_OFFSET` (`Documentation/virt/kvm/devices/vcpu.rst`, 4.1), at `value`.
fn tsc_offset(value: &AtomicU64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: value.as_ptr() as u64,
        ..Default::default()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Why a vCPU cannot go on.
#[derive(Debug, Error)]
pub enum VcpuError {
    /// KVM met an instruction that neither the processor nor its emulator runs.
    #[error(
        "KVM cannot run the guest: emulation failed at {rip:#x}{hint}",
        hint = if super::processor_virtualizes() { "" } else {
            "; this host's processor does not show vmx or svm, so its /dev/kvm is not a real one: \
             use a host with hardware virtualization"
        }
    )]
    Emulation {
        /// The instruction's address in the guest.
        rip: u64,
    },
    /// The processor refused to enter the guest with the vCPU's state.
    #[error("the processor refused to enter the guest (hardware reason {0:#x})")]
    Entry(u64),
    /// KVM failed internally.
    #[error("KVM gave up on the guest (internal error {suberror}; data {data:x?})")]
    Internal {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// KVM's data about it (`Documentation/virt/kvm/api.rst`, KVM_EXIT_INTERNAL_ERROR).
        data: Vec<u64>,
    },
    /// An exit that this machine's configuration cannot cause.
    #[error("KVM reported an exit that this machine does not cause: {0}")]
    Unexpected(String),
    /// The ioctl failed.
    #[error("KVM cannot run a vCPU")]
    Run(#[source] io::Error),
}

/// What ended a run of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// A device access was answered, or nothing happened: run again.
    Handled,
    /// Another thread interrupted the run.
    Interrupted,
    /// The guest restarted its processor (a triple fault, for example).
    Reset,
    /// The guest shut down through the hypervisor.
    PowerOff,
}

/// Exits to user space, by reason.
#[derive(Debug, Default)]
pub struct ExitCounts {
    /// Reads of ports.
    pub io_in: AtomicU64,
    /// Writes to ports.
    pub io_out: AtomicU64,
    /// Reads of device memory.
    pub mmio_read: AtomicU64,
    /// Writes to device memory.
    pub mmio_write: AtomicU64,
    /// Interrupted runs.
    pub interrupted: AtomicU64,
    /// Everything else.
    pub other: AtomicU64,
}

impl ExitCounts {
    /// All exits.
    pub fn total(&self) -> u64 {
        [
            &self.io_in,
            &self.io_out,
            &self.mmio_read,
            &self.mmio_write,
            &self.interrupted,
            &self.other,
        ]
        .iter()
        .map(|count| count.load(Ordering::Relaxed))
        .sum()
    }
}

/// A vCPU of KVM.
#[derive(Debug)]
pub struct KvmVcpu {
    fd: VcpuFd,
    /// Serialises readers of the ring of coalesced accesses, if the machine has one.
    coalesced: Option<Arc<Mutex<()>>>,
}

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

/// The signal that interrupts KVM_RUN on a vCPU thread.
pub fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// Installs the handler of the kick signal, which would end the process otherwise. Call it before the first kick.
pub fn catch_kicks() -> io::Result<()> {
    register_signal_handler(kick_signal(), on_kick)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// A signal between the check for work and KVM_RUN would be lost, unless it leaves a mark that KVM_RUN
/// looks at (`Documentation/virt/kvm/api.rst`, immediate_exit).
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer is into the kvm_run mapping of a live vCPU that this very thread owns: `KvmVcpu::bind`
        // sets it and `Drop` clears it.
        unsafe { flag.write_volatile(1) };
    }
}

impl KvmVcpu {
    pub(super) fn new(mut fd: VcpuFd, coalesced: Option<Arc<Mutex<()>>>) -> Result<Self, KvmError> {
        if coalesced.is_some() {
            fd.map_coalesced_mmio_ring()
                .map_err(ioctl("map the ring of coalesced accesses"))?;
        }
        Ok(Self { fd, coalesced })
    }

    /// Sets CPUID, and registers for the vCPU that starts. The others wait for start-up interrupts of the guest.
    pub fn set_up(&self, cpuid: &CpuId, start: Option<&InitialState>) -> Result<(), KvmError> {
        self.fd.set_cpuid2(cpuid).map_err(ioctl("set CPUID"))?;
        let Some(start) = start else { return Ok(()) };
        let msrs = Msrs::from_entries(&start.msrs).map_err(|error| KvmError::Ioctl {
            action: "take a list of MSRs",
            source: io::Error::other(format!("{error:?}")),
        })?;
        self.fd.set_msrs(&msrs).map_err(ioctl("set MSRs"))?;
        let mut sregs = self
            .fd
            .get_sregs()
            .map_err(ioctl("read system registers"))?;
        start.apply_sregs(&mut sregs);
        self.fd
            .set_sregs(&sregs)
            .map_err(ioctl("set system registers"))?;
        self.fd.set_fpu(&start.fpu).map_err(ioctl("set the FPU"))?;
        self.fd
            .set_regs(&start.regs)
            .map_err(ioctl("set registers"))
    }

    /// Binds the vCPU to this thread: a kick sets `immediate_exit` from now on.
    pub fn bind(&mut self) {
        IMMEDIATE_EXIT.set(&raw mut self.fd.get_kvm_run().immediate_exit);
    }

    /// Runs the guest until an exit, and answers device accesses.
    pub fn run(
        &mut self,
        ports: &AddressSpace,
        memory: &AddressSpace,
        counts: &ExitCounts,
    ) -> Result<Exit, VcpuError> {
        let (exit, access) = match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => (None, Some((port, data.as_mut_ptr(), data.len()))),
            Ok(VcpuExit::IoOut(port, data)) => {
                (None, Some((port, data.as_ptr().cast_mut(), data.len())))
            }
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                counts.mmio_read.fetch_add(1, Ordering::Relaxed);
                memory.read(gpa, data);
                return Ok(Exit::Handled);
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                counts.mmio_write.fetch_add(1, Ordering::Relaxed);
                memory.write(gpa, data);
                return Ok(Exit::Handled);
            }
            Ok(VcpuExit::Shutdown) => (Some(Ok(Exit::Reset)), None),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => (Some(Ok(Exit::Reset)), None),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
                (Some(Ok(Exit::PowerOff)), None)
            }
            Ok(VcpuExit::Intr) => (Some(Ok(Exit::Interrupted)), None),
            Ok(VcpuExit::FailEntry(reason, _)) => (Some(Err(VcpuError::Entry(reason))), None),
            Ok(VcpuExit::InternalError) => (None, None),
            Ok(other) => (Some(Err(VcpuError::Unexpected(format!("{other:?}")))), None),
            Err(error) => match io::Error::from_raw_os_error(error.errno()) {
                source
                    if matches!(
                        source.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                    ) =>
                {
                    self.fd.set_kvm_immediate_exit(0);
                    (Some(Ok(Exit::Interrupted)), None)
                }
                source => (Some(Err(VcpuError::Run(source))), None),
            },
        };
        if let Some((port, data, len)) = access {
            self.replay_coalesced(ports);
            // SAFETY: KVM filled the `io` member for this exit. `data` with `len` bytes is in the vCPU's kvm_run
            // mapping, apart from the fields read, and the mapping lives as long as `self.fd`.
            let (io, data) = unsafe {
                (
                    self.fd.get_kvm_run().__bindgen_anon_1.io,
                    std::slice::from_raw_parts_mut(data, len),
                )
            };
            let count = if u32::from(io.direction) == KVM_EXIT_IO_OUT {
                &counts.io_out
            } else {
                &counts.io_in
            };
            count.fetch_add(1, Ordering::Relaxed);
            // A string instruction is one exit with many accesses to one port.
            for element in data.chunks_mut(usize::from(io.size).max(1)) {
                if u32::from(io.direction) == KVM_EXIT_IO_OUT {
                    ports.write(u64::from(port), element);
                } else {
                    ports.read(u64::from(port), element);
                }
            }
            return Ok(Exit::Handled);
        }
        let count = match exit {
            Some(Ok(Exit::Interrupted)) => &counts.interrupted,
            _ => &counts.other,
        };
        count.fetch_add(1, Ordering::Relaxed);
        exit.unwrap_or_else(|| Err(self.internal_error()))
    }

    /// Offset of the guest's time stamp counter from that of the host, in cycles.
    pub fn tsc_offset(&self) -> io::Result<u64> {
        let offset = AtomicU64::new(0);
        // SAFETY: the ioctl writes the u64 that the attribute points to.
        check(unsafe { ioctl_with_ref(&self.fd, KVM_GET_DEVICE_ATTR(), &tsc_offset(&offset)) })?;
        Ok(offset.into_inner())
    }

    /// Sets the offset of the guest's time stamp counter from that of the host. Tells the guest that it was stopped, so
    /// that its watchdogs do not fire.
    pub fn resume_clock(&self, offset: u64) -> io::Result<()> {
        let offset = AtomicU64::new(offset);
        // SAFETY: the ioctl reads the u64 that the attribute points to.
        check(unsafe { ioctl_with_ref(&self.fd, KVM_SET_DEVICE_ATTR(), &tsc_offset(&offset)) })?;
        // Fails for a guest without a paravirtual clock, which need not know.
        let _ = self.fd.kvmclock_ctrl();
        Ok(())
    }

    /// Performs the writes that KVM coalesced, in their order.
    fn replay_coalesced(&mut self, ports: &AddressSpace) {
        let Some(ring) = &self.coalesced else { return };
        let _ring = ring.lock();
        while let Ok(Some(write)) = self.fd.coalesced_mmio_read() {
            if let Some(data) = write.data.get(..write.len as usize) {
                ports.write(write.phys_addr, data);
            }
        }
    }

    fn internal_error(&mut self) -> VcpuError {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        // SAFETY: KVM filled the `internal` member for this exit.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        match internal.suberror {
            KVM_INTERNAL_ERROR_EMULATION => VcpuError::Emulation { rip },
            suberror => VcpuError::Internal {
                suberror,
                data: internal
                    .data
                    .into_iter()
                    .take(internal.ndata as usize)
                    .collect(),
            },
        }
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
    }
}
