//! The threads that run vCPUs, and how they stop and go on.

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use fanlight_devices::{
    legacy::{GuestRequest, RequestSink},
    memory::AddressSpace,
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

/// Told why a vCPU cannot go on.
pub type VcpuFailureSink = Arc<dyn Fn(VcpuError) + Send + Sync>;

/// What all threads are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// Run the guest.
    Run,
    /// Stand still.
    Pause,
    /// Still stand still, and take so many cycles of the host out of the guest's time.
    SkipCycles(u64),
    /// End.
    Stop,
}

/// Where threads stop and wait.
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
    /// The order is not to run: looked at after each exit.
    attention: AtomicBool,
}

struct GateState {
    order: Order,
    /// Number of the order.
    number: u64,
    /// Threads that have followed it.
    followed: usize,
    /// Threads that have not ended.
    alive: usize,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, GateState>) -> MutexGuard<'a, GateState> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// On a vCPU's thread: follows orders until it is to run (true) or to end (false).
    fn pass(&self, vcpu: &KvmVcpu) -> bool {
        let mut seen = None;
        // Read when it stops: a host whose own counter is unstable changes it while nobody runs.
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
                    tracing::warn!(%error, "the guest will see that time has passed");
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

/// vCPUs that run, or stand still. Dropping stops and joins them.
pub struct VcpuThreads {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

impl VcpuThreads {
    /// Starts a thread for each vCPU, which counts its exits to user space.
    pub fn start(
        vcpus: impl ExactSizeIterator<Item = (KvmVcpu, Arc<ExitCounts>)>,
        shared: &Arc<Shared>,
    ) -> io::Result<Self> {
        // A machine that is stopped at once kicks threads that have not begun.
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

    /// Stops all vCPUs; when it returns none runs.
    pub fn pause(&self) {
        self.order(Order::Pause);
    }

    /// Takes cycles of the host out of the guest's time. Only while vCPUs stand still.
    pub fn skip_cycles(&self, cycles: u64) {
        self.order(Order::SkipCycles(cycles));
    }

    /// Lets all vCPUs go on.
    pub fn resume(&self) {
        self.order(Order::Run);
    }

    /// Gives an order. One to stand still has been followed by all when this returns.
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
            // One signal is enough: it leaves a mark that the next KVM_RUN sees.
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
