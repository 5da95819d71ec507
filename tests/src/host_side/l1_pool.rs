//! Nested hosts that tests run in. Tests that leave their host as it was share an L1, one after the other.
//!
//! An L1 in which a test failed takes no other test, so no failure can cause another one. Neither does one that has
//! run its share, which bounds what adds up in an emulator.

use std::{
    fs,
    io::{self, PipeWriter, Write},
    os::fd::OwnedFd,
    path::PathBuf,
    process::Stdio,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
};

use rustix::process::{Signal, pidfd_send_signal};

use super::{
    test_case::TestCase,
    test_server::{READY, STATUS},
};
use crate::{
    Context, Failure, Result,
    nested_host::{L1Device, NestedHost, Share},
};

/// Tests of an L1. A start takes about as long as a short test.
const TESTS_PER_L1: usize = 10;
/// Runs of a test whose L1 ended: the emulator crashes now and then under nested guests, or stops a processor of L1,
/// which ends L1 too ([`crate::nested_host::cpu_watchdog`]). Neither says anything about the test. A test that fails is
/// not run again, whatever it waited for.
const TRIES: usize = 2;
/// Runs that may be repeated in all. More of them hide something that is worth a look.
const REPEATS: usize = 3;

/// What each L1 is started with.
pub struct Setup {
    /// Makes L1.
    pub nested_host: NestedHost,
    /// The program that serves tests in L1, as L1 sees it, with its arguments.
    pub job: String,
    /// Programs of this machine whose libraries L1 needs.
    pub programs: Vec<PathBuf>,
    /// Folders that L1 sees.
    pub shares: Vec<Share>,
    /// Where the output of a run is kept whose L1 ended.
    pub logs: PathBuf,
}

/// Nested hosts for tests.
pub struct L1Pool {
    setup: Arc<Setup>,
    idle: Mutex<Vec<L1>>,
    started: AtomicUsize,
    repeated: Mutex<Vec<&'static str>>,
}

/// A nested host that waits for the name of a test.
struct L1 {
    input: PipeWriter,
    output: Receiver<Vec<u8>>,
    emulator: OwnedFd,
    /// Gives how L1 ended.
    thread: Option<JoinHandle<Result<i32>>>,
    tests: usize,
}

impl L1Pool {
    /// No L1 yet.
    pub fn new(setup: Setup) -> Self {
        Self {
            setup: Arc::new(setup),
            idle: Mutex::default(),
            started: AtomicUsize::new(0),
            repeated: Mutex::default(),
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<L1>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many nested hosts were started, and which tests ran again because theirs ended.
    pub fn summary(&self) -> String {
        let started = self.started.load(Ordering::Relaxed);
        let repeated = self.repeated.lock();
        let repeated = repeated.unwrap_or_else(PoisonError::into_inner);
        let names = match repeated.join(", ") {
            names if names.is_empty() => names,
            names => format!(" ({names})"),
        };
        let count = repeated.len();
        format!("{started} nested hosts started, {count} runs repeated{names}")
    }

    /// Runs a test, again if its L1 ended. What a test said that passed.
    pub fn run(&self, case: &TestCase) -> Result<String> {
        let mut run = 0;
        loop {
            run += 1;
            let mut output = String::new();
            let fault = match self.run_once(case, &mut output) {
                Ok(0) => return Ok(output),
                Ok(_) => return Err(Failure(output)),
                Err(fault) => fault,
            };
            if run == TRIES || !self.may_repeat(case.name) {
                return Err(Failure::new(fault, output));
            }
            let name = case.name.replace("::", "-");
            let log = self.setup.logs.join(format!("{name}-{run}.log"));
            fs::write(&log, output).context(format!("cannot write {}", log.display()))?;
            let log = log.display();
            eprintln!("fanlight: {}: {fault}; it runs again ({log})", case.name);
        }
    }

    /// Notes a repeated run, if there may be one.
    fn may_repeat(&self, name: &'static str) -> bool {
        let repeated = self.repeated.lock();
        let mut repeated = repeated.unwrap_or_else(PoisonError::into_inner);
        let may = repeated.len() < REPEATS;
        if may {
            repeated.push(name);
        }
        may
    }

    /// Runs a test in an L1; its exit status. An error says that L1 ended.
    fn run_once(&self, case: &TestCase, output: &mut String) -> Result<i32> {
        let shared = case.shares_host().then(|| self.idle().pop()).flatten();
        let mut l1 = match shared {
            Some(l1) => l1,
            None => {
                self.started.fetch_add(1, Ordering::Relaxed);
                L1::start(&self.setup, case.devices, output)?
            }
        };
        let status = l1.run(case.name, output)?;
        if status == 0 && case.shares_host() && l1.tests < TESTS_PER_L1 {
            self.idle().push(l1);
        }
        Ok(status)
    }
}

/// Sends L1's output to another thread.
struct Output(Sender<Vec<u8>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Nobody listens any more when L1 is about to be killed.
        let _ = self.0.send(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl L1 {
    /// Starts one, and waits until it takes tests.
    fn start(setup: &Arc<Setup>, devices: &'static [L1Device], said: &mut String) -> Result<Self> {
        let (reader, input) = io::pipe().context("cannot make a pipe")?;
        let (sender, output) = channel();
        let (handles, handle) = channel();
        // The emulator ends with the thread that started it, so that thread waits for it too.
        let thread = thread::spawn({
            let setup = setup.clone();
            move || {
                let programs: Vec<_> = setup.programs.iter().map(PathBuf::as_path).collect();
                let running = setup.nested_host.start(
                    devices,
                    &setup.job,
                    &programs,
                    &setup.shares,
                    Stdio::from(reader),
                    |_| Ok(()),
                )?;
                let _ = handles.send(running.handle()?);
                running.wait(&mut Output(sender))
            }
        });
        let Ok(emulator) = handle.recv() else {
            let error = thread
                .join()
                .map_err(|_| Failure("a thread panicked".into()))?;
            return Err(error.err().unwrap_or_else(|| Failure("no emulator".into())));
        };
        let mut l1 = Self {
            input,
            output,
            emulator,
            thread: Some(thread),
            tests: 0,
        };
        l1.hear(said, |line| line.ends_with(READY).then_some(()))?;
        Ok(l1)
    }

    /// Runs a test; its exit status.
    fn run(&mut self, name: &str, said: &mut String) -> Result<i32> {
        self.tests += 1;
        writeln!(self.input, "{name}").context("the nested host takes no test")?;
        self.hear(said, |line| line.strip_prefix(STATUS)?.trim().parse().ok())
    }

    /// Adds the output to `said` up to the line that `wanted` takes.
    fn hear<T>(&mut self, said: &mut String, wanted: impl Fn(&str) -> Option<T>) -> Result<T> {
        loop {
            // L1 that is silent is ended by who watches its signs of life.
            let Ok(line) = self.output.recv() else {
                return Err(self.ended());
            };
            let line = String::from_utf8_lossy(&line).into_owned();
            if let Some(found) = wanted(line.trim_end()) {
                return Ok(found);
            }
            said.push_str(&line);
        }
    }

    fn ended(&mut self) -> Failure {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(Err(error))) => error,
            Some(Ok(Ok(status))) => Failure(format!("the nested host ended with status {status}")),
            _ => Failure("the nested host ended".into()),
        }
    }
}

impl Drop for L1 {
    fn drop(&mut self) {
        let _ = pidfd_send_signal(&self.emulator, Signal::KILL);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
