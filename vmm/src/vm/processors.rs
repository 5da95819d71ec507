//! The machine's vCPUs: waiting for their start, running, or paused together with the guest's clocks.

use std::sync::Arc;

use crate::{
    kvm::{ClockState, ExitCounts, KvmVcpu, KvmVm},
    vm::{
        error::MachineError,
        vcpus::{Shared, VcpuThreads},
    },
};

/// The machine's vCPUs. Dropping stops them.
pub struct Processors {
    threads: Option<VcpuThreads>,
    /// vCPUs that have not started.
    ready: Vec<KvmVcpu>,
    exits: Vec<Arc<ExitCounts>>,
    /// The guest's clocks, while the vCPUs are paused.
    paused: Option<ClockState>,
    kvm: Arc<KvmVm>,
    shared: Arc<Shared>,
}

impl Processors {
    /// No vCPUs yet.
    pub fn new(kvm: Arc<KvmVm>, shared: Shared) -> Self {
        Self {
            threads: None,
            ready: Vec::new(),
            exits: Vec::new(),
            paused: None,
            kvm,
            shared: Arc::new(shared),
        }
    }

    /// Adds vCPUs that are ready to start.
    pub fn add(&mut self, vcpus: Vec<KvmVcpu>) {
        self.exits.extend(vcpus.iter().map(|_| Arc::default()));
        self.ready.extend(vcpus);
    }

    /// Starts the vCPUs.
    pub fn start(&mut self) -> Result<(), MachineError> {
        let ready = std::mem::take(&mut self.ready);
        let vcpus = ready.into_iter().zip(self.exits.iter().cloned());
        let threads = VcpuThreads::start(vcpus, &self.shared);
        self.threads = Some(threads.map_err(MachineError::host("start a vCPU thread"))?);
        Ok(())
    }

    /// Stops the vCPUs and the guest's clocks. Does nothing if they are stopped.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        if let (Some(threads), None) = (&self.threads, self.paused) {
            threads.pause();
            match self.kvm.clock() {
                Ok(clock) => self.paused = Some(clock),
                Err(error) => {
                    threads.resume();
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    /// Resumes the vCPUs, and the guest's clocks from where they stopped.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        if let (Some(threads), Some(clock)) = (&self.threads, self.paused) {
            // The time stamp counters first: the paravirtual clock is set in terms of them.
            threads.skip_cycles(clock.cycles_since());
            self.kvm.set_clock(&clock)?;
            self.paused = None;
            threads.resume();
        }
        Ok(())
    }

    /// Raises a non-maskable interrupt at each vCPU.
    pub fn raise_nmi(&self) -> Result<(), MachineError> {
        (0..)
            .zip(&self.exits)
            .try_for_each(|(id, _)| self.kvm.raise_nmi(id))
            .map_err(MachineError::from)
    }

    /// Exits to user space of each vCPU so far.
    pub fn exits(&self) -> impl Iterator<Item = &ExitCounts> {
        self.exits.iter().map(|exits| &**exits)
    }

    /// Exits to user space of all vCPUs so far.
    pub fn total_exits(&self) -> u64 {
        self.exits().map(ExitCounts::total).sum()
    }
}
