//! The threads that run vCPUs: start, pause, resume, stop.

use std::{
    io,
    sync::{
        Arc, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use fanlight_devices::{
    legacy::{GuestRequest, RequestSink},
    memory::AddressSpace,
    sync::{Condvar, Mutex},
};
use vmm_sys_util::signal::Killable;

use crate::kvm::{Exit, ExitCounts, KvmVcpu, VcpuError, catch_kicks, kick_signal};

/// What vCPU threads share.
pub struct Shared {
    /// I/O ports.
    pub ports: Arc<AddressSpace>,
    /// Guest-physical memory.
    pub memory: Arc<AddressSpace>,
    /// Takes the guest's requests.
    pub requests: RequestSink,
    /// Takes the failure that ends the machine.
    pub failures: VcpuFailureSink,
}

/// Takes the reason why a vCPU cannot go on.
pub type VcpuFailureSink = Arc<dyn Fn(VcpuError) + Send + Sync>;

/// An order to all threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// Run the guest.
    Run,
    /// Pause.
    Pause,
    /// Stay paused, and move the guest's time stamp counter back by this many cycles.
    SkipCycles(u64),
    /// End.
    Stop,
}

/// Where threads wait while they do not run.
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
    /// Whether the order is not to run. Read before each run.
    attention: AtomicBool,
}

struct GateState {
    order: Order,
    /// Sequence number of the order.
    number: u64,
    /// Threads that have followed it.
    followed: usize,
    /// Threads that have not ended.
    alive: usize,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock()
    }

    fn wait<'a>(&self, state: MutexGuard<'a, GateState>) -> MutexGuard<'a, GateState> {
        self.changed.wait(state)
    }

    /// On a vCPU thread: follows orders until one is to run (true) or to stop (false).
    fn pass(&self, vcpu: &KvmVcpu) -> bool {
        let mut seen = None;
        // Read as the vCPU stops: KVM changes it during the pause on a host with an unstable time stamp counter.
        let mut offset = None;
        let mut state = self.lock();
        loop {
            match state.order {
                Order::Run => return true,
                Order::Stop => return false,
                Order::Pause | Order::SkipCycles(_) => {}
            }
            if seen != Some(state.number) {
                seen = Some(state.number);
                let result = match (state.order, offset) {
                    (Order::SkipCycles(cycles), Some(offset)) => {
                        vcpu.resume_clock(u64::wrapping_sub(offset, cycles))
                    }
                    _ => vcpu.tsc_offset().map(|read| offset = Some(read)),
                };
                if let Err(error) = result {
                    tracing::warn!(%error, "the guest will see the time of the pause");
                }
                state.followed += 1;
                self.changed.notify_all();
            }
            state = self.wait(state);
        }
    }
}

/// Counts a thread as ended, however it ends.
struct Alive<'a>(&'a Gate);

impl Drop for Alive<'_> {
    fn drop(&mut self) {
        self.0.lock().alive -= 1;
        self.0.changed.notify_all();
    }
}

/// vCPUs that run or are paused. Dropping stops and joins their threads.
pub struct VcpuThreads {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

impl VcpuThreads {
    /// Starts a thread for each vCPU. The thread counts the exits to user space.
    pub fn start(
        vcpus: impl ExactSizeIterator<Item = (KvmVcpu, Arc<ExitCounts>)>,
        shared: &Arc<Shared>,
    ) -> io::Result<Self> {
        // A machine that stops at once kicks threads that have not bound their vCPU.
        catch_kicks()?;
        let mut running = Self {
            gate: Arc::new(Gate {
                state: Mutex::new(GateState {
                    order: Order::Run,
                    number: 0,
                    followed: 0,
                    alive: 0,
                }),
                changed: Condvar::new(),
                attention: AtomicBool::new(false),
            }),
            threads: Vec::with_capacity(vcpus.len()),
        };
        for (index, (mut vcpu, exits)) in vcpus.enumerate() {
            let (shared, gate) = (shared.clone(), running.gate.clone());
            gate.lock().alive += 1;
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || {
                    let _alive = Alive(&gate);
                    run(&mut vcpu, &shared, &exits, &gate);
                });
            match thread {
                Ok(thread) => running.threads.push(thread),
                Err(error) => {
                    running.gate.lock().alive -= 1;
                    return Err(error);
                }
            }
        }
        Ok(running)
    }

    /// Pauses all vCPUs; none runs when it returns.
    pub fn pause(&self) {
        self.order(Order::Pause);
    }

    /// Moves the guest's time stamp counters back by `cycles`. Only while the vCPUs are paused.
    pub fn skip_cycles(&self, cycles: u64) {
        self.order(Order::SkipCycles(cycles));
    }

    /// Resumes all vCPUs.
    pub fn resume(&self) {
        self.order(Order::Run);
    }

    /// Gives an order. All threads have followed one to pause when this returns.
    fn order(&self, order: Order) {
        let mut state = self.gate.lock();
        state.order = order;
        state.number += 1;
        state.followed = 0;
        self.gate
            .attention
            .store(order != Order::Run, Ordering::Release);
        drop(state);
        self.gate.changed.notify_all();
        if order == Order::Run {
            return;
        }
        for thread in &self.threads {
            // One signal is enough: it sets `immediate_exit` for the next KVM_RUN.
            if let Err(error) = thread.kill(kick_signal()) {
                tracing::debug!(?error, "a vCPU thread has ended already");
            }
        }
        let mut state = self.gate.lock();
        while order != Order::Stop && state.followed < state.alive {
            state = self.gate.wait(state);
        }
    }
}

fn run(vcpu: &mut KvmVcpu, shared: &Shared, exits: &ExitCounts, gate: &Gate) {
    vcpu.bind();
    loop {
        if gate.attention.load(Ordering::Acquire) && !gate.pass(vcpu) {
            return;
        }
        match vcpu.run(&shared.ports, &shared.memory, exits) {
            Ok(Exit::Handled | Exit::Interrupted) => {}
            Ok(Exit::Reset) => return (shared.requests)(GuestRequest::Reset),
            Ok(Exit::PowerOff) => return (shared.requests)(GuestRequest::PowerOff),
            Err(error) => return (shared.failures)(error),
        }
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.order(Order::Stop);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
