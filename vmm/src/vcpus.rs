//! The threads that run vCPUs.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use fanlight_devices::{
    legacy::{GuestRequest, RequestSink},
    memory::AddressSpace,
};
use vmm_sys_util::signal::Killable;

use crate::kvm::{Exit, ExitCounts, KvmVcpu, VcpuError, kick_signal};

/// What vCPU threads share.
pub struct Shared {
    /// I/O ports.
    pub ports: Arc<AddressSpace>,
    /// Guest-physical memory.
    pub memory: Arc<AddressSpace>,
    /// Takes the guest's requests.
    pub requests: RequestSink,
    /// Takes the failure that ends the machine.
    pub failures: Arc<dyn Fn(VcpuError) + Send + Sync>,
    /// Exits to user space of all vCPUs.
    pub exits: Arc<ExitCounts>,
}

/// Running vCPUs. Dropping stops and joins them.
pub struct VcpuThreads {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl VcpuThreads {
    /// Starts a thread for each vCPU.
    pub fn start(vcpus: Vec<KvmVcpu>, shared: Shared) -> io::Result<Self> {
        let shared = Arc::new(shared);
        let mut running = Self {
            stop: Arc::default(),
            threads: Vec::with_capacity(vcpus.len()),
        };
        for (index, mut vcpu) in vcpus.into_iter().enumerate() {
            let (shared, stop) = (shared.clone(), running.stop.clone());
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || run(&mut vcpu, &shared, &stop))?;
            running.threads.push(thread);
        }
        Ok(running)
    }
}

fn run(vcpu: &mut KvmVcpu, shared: &Shared, stop: &AtomicBool) {
    if let Err(error) = vcpu.bind() {
        tracing::error!(%error, "a vCPU thread cannot be interrupted");
    }
    while !stop.load(Ordering::Acquire) {
        match vcpu.run(&shared.ports, &shared.memory, &shared.exits) {
            Ok(Exit::Handled | Exit::Interrupted) => {}
            Ok(Exit::Reset) => return (shared.requests)(GuestRequest::Reset),
            Ok(Exit::PowerOff) => return (shared.requests)(GuestRequest::PowerOff),
            Err(error) => return (shared.failures)(error),
        }
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            // One signal is enough: it leaves a mark that the next KVM_RUN sees.
            if let Err(error) = thread.kill(kick_signal()) {
                tracing::debug!(?error, "a vCPU thread has ended already");
            }
            let _ = thread.join();
        }
    }
}
