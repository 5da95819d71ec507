//! End-to-end tests: stock guests on a real KVM, which is this host's, or the nested host's.
//!
//! A test is plain code that starts `fanlight` and looks at what guest and host see. It runs in a process of its own:
//! this program runs itself again, on this machine or in a nested host (L1). [`TestCase`] says what a test needs; those
//! that need nothing share an L1, one after the other (`host_side::l1_pool`).

mod e2e {
    pub mod api;
    pub mod boot;
    pub mod compositor;
    pub mod console;
    pub mod disk;
    pub mod dmabuf;
    pub mod docs;
    pub mod drm;
    pub mod gpu;
    pub mod input;
    pub mod interrupts;
    pub mod life;
    pub mod network;
    pub mod render;
    pub mod seat;
    pub mod test_compositor;
    pub mod topology;
    pub mod vfio;
    pub mod view;
    pub mod virtual_input;
    pub mod vram;
    pub mod window;
}

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use e2e::vfio::hardware::{self, VARIABLE};
use fanlight_tests::{
    Context, Failure, Result,
    host_side::{
        compositor::compositors,
        guest::Assets,
        kvm_host::{self, Kvm},
        l1_pool::{L1Pool, Setup},
        test_case::TestCase,
        test_process, test_server,
    },
    nested_host::{
        ApiClients, Busybox, Cache, DebianPrograms, Drivers, Emulator, GraphicsStack, L1Kernel,
        Modules, NestedHost, Share, StockKernel, build_program, built_kernel, cpu_watchdog,
        guest_archive, guest_module, program_under_test,
    },
};
use libtest_mimic::{Arguments, Trial};

/// All tests. Those that have their host for themselves come first: they take longest, and the end of a run then has
/// short ones for both threads.
fn tests() -> Vec<TestCase> {
    let groups = [
        e2e::vfio::TESTS,
        hardware::TESTS,
        e2e::dmabuf::TESTS,
        e2e::vram::TESTS,
        e2e::drm::TESTS,
        e2e::gpu::TESTS,
        e2e::render::TESTS,
        e2e::view::TESTS,
        e2e::window::TESTS,
        e2e::seat::TESTS,
        e2e::api::life::TESTS,
        e2e::api::hotplug::TESTS,
        e2e::api::clients::TESTS,
        e2e::api::events::TESTS,
        e2e::api::handover::TESTS,
        e2e::api::ctl::TESTS,
        e2e::boot::TESTS,
        e2e::console::TESTS,
        e2e::disk::TESTS,
        e2e::docs::TESTS,
        e2e::input::TESTS,
        e2e::interrupts::TESTS,
        e2e::life::TESTS,
        e2e::network::TESTS,
        e2e::topology::TESTS,
    ];
    let mut tests = groups.concat();
    tests.sort_by_key(TestCase::shares_host);
    tests
}

fn find(name: &str) -> Result<TestCase> {
    let test = tests().into_iter().find(|test| test.name == name);
    test.ok_or_else(|| Failure(format!("there is no test {name:?}")))
}

/// Has this program run one test; the name and [`Parts`] follow.
const RUN_ONE: &str = "--run-one";
/// Has this program run tests in L1; [`Parts`] follow.
const SERVE: &str = "--serve";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &*arguments {
        [verb, name, parts @ ..] if verb == RUN_ONE => exit_code(run_one(name, parts)),
        [verb, parts @ ..] if verb == SERVE => {
            cpu_watchdog::watch();
            test_server::serve(|name| command(name, Parts::of(parts)?))
        }
        _ => match run(Arguments::from_args()) {
            Ok(code) => code,
            Err(error) => {
                eprintln!("fanlight: the end-to-end tests cannot run: {error}");
                ExitCode::FAILURE
            }
        },
    }
}

fn exit_code(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Where the program that runs a test finds what tests are made of.
#[derive(Clone)]
struct Parts {
    cache: PathBuf,
    fanlight: PathBuf,
    guest_archive: PathBuf,
}

impl Parts {
    fn of(arguments: &[String]) -> Result<Self> {
        let [cache, fanlight, guest_archive] = arguments else {
            return Err(Failure(format!("not the parts of tests: {arguments:?}")));
        };
        Ok(Self {
            cache: cache.into(),
            fanlight: fanlight.into(),
            guest_archive: guest_archive.into(),
        })
    }

    fn in_order(&self) -> [&Path; 3] {
        [&self.cache, &self.fanlight, &self.guest_archive]
    }
}

/// The command that runs a test.
fn command(name: &str, parts: Parts) -> Result<Command> {
    let this = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new(this);
    command.arg(RUN_ONE).arg(name).args(parts.in_order());
    Ok(command)
}

/// Runs the test, which must leave nothing behind.
fn run_one(name: &str, parts: &[String]) -> Result<()> {
    let test = find(name)?;
    let parts = Parts::of(parts)?;
    // L1 runs one test at a time, and devices have interfaces in the network of the host.
    let in_nested_host = std::env::var_os(kvm_host::IN_NESTED_HOST).is_some();
    test_process::confine(!in_nested_host && test.devices.is_empty())?;
    let before = test_process::interfaces()?;
    let nothing_is_left = || match test.devices {
        [] => test_process::nothing_is_left(&before),
        // Interfaces of devices come and stay.
        _ => test_process::nothing_is_left(&test_process::interfaces()?),
    };
    let result = assets(&parts)
        .and_then(|assets| (test.run)(&assets))
        .and_then(|()| nothing_is_left());
    test_process::end_descendants();
    result
}

/// Tests with the time that each took.
struct Times {
    /// Whether to print what passing tests said.
    tells_all: bool,
    times: Mutex<Vec<(Duration, &'static str)>>,
}

impl Times {
    /// Runs a test, and says how long it took and how it failed.
    fn measure(&self, name: &'static str, run: impl FnOnce() -> Result<String>) -> Result<()> {
        let start = Instant::now();
        let result = run();
        let took = start.elapsed();
        match &result {
            Ok(said) if self.tells_all => eprintln!("fanlight: {name} said:\n{said}"),
            Ok(_) => {}
            // At once, because a run that is ended early prints no list of failures.
            Err(error) => eprintln!("fanlight: {name} failed: {error}"),
        }
        eprintln!("fanlight: {name}: {:.1} s", took.as_secs_f64());
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        times.push((took, name));
        result.map(drop)
    }

    /// The tests that took longest.
    fn longest(&self) -> String {
        const SHOWN: usize = 5;
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        times.sort_unstable();
        let longest = times.iter().rev().take(SHOWN);
        let longest = longest.map(|(took, name)| format!("{name} {:.0} s", took.as_secs_f64()));
        longest.collect::<Vec<_>>().join(", ")
    }
}

/// Several filters, separated by commas: a test runs that one of them matches.
struct Filters(Vec<String>, bool);

impl Filters {
    /// Takes them out of the arguments.
    fn take(arguments: &mut Arguments) -> Self {
        let all = arguments.filter.take().unwrap_or_default();
        Self(all.split(',').map(str::to_owned).collect(), arguments.exact)
    }

    fn matches(&self, name: &str) -> bool {
        let Self(all, exact) = self;
        let matches = |filter: &String| match exact {
            true => name == filter,
            false => name.contains(filter),
        };
        // No filter is an empty one.
        all.iter()
            .any(|filter| filter.is_empty() || matches(filter))
    }
}

/// A trial for each test that the filters match. `left_out` says which ones are ignored.
fn trials(
    filters: &Filters,
    times: &Arc<Times>,
    left_out: impl Fn(&TestCase) -> bool,
    run: impl Fn(&TestCase) -> Result<String> + Clone + Send + 'static,
) -> Vec<Trial> {
    tests()
        .into_iter()
        .filter(|test| filters.matches(test.name))
        .map(|test| {
            let (run, times) = (run.clone(), times.clone());
            let is_left_out = left_out(&test);
            Trial::test(test.name, move || {
                let result = times.measure(test.name, || run(&test));
                result.map_err(|_| "its output is above, where it ended".into())
            })
            .with_ignored_flag(is_left_out)
        })
        .collect()
}

fn run(mut arguments: Arguments) -> Result<ExitCode> {
    let times = Arc::new(Times {
        tells_all: arguments.nocapture || std::env::var_os(VARIABLE).is_some(),
        times: Mutex::default(),
    });
    let filters = Filters::take(&mut arguments);
    if arguments.list {
        let trials = trials(
            &filters,
            &times,
            |_| false,
            |_| Err(Failure("only listed".into())),
        );
        return Ok(libtest_mimic::run(&arguments, trials).exit_code());
    }
    // An emulated host keeps a processor and a half of this machine's busy.
    arguments.test_threads.get_or_insert(2);
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let cache = Cache::open()?;
    let parts = Parts {
        fanlight: program_under_test()?,
        guest_archive: dir.path().join("guest.cpio"),
        cache: cache.root().into(),
    };
    let agent = build_program("fanlight-tests", "guest-agent")?;
    let modules = Modules::find(&StockKernel::get(&cache)?.modules)?;
    let archive = guest_archive(&Busybox::get(&cache)?, Some(&modules), Some(&agent))?;
    fs::write(&parts.guest_archive, archive).context("cannot write the guest's root")?;
    // All that is downloaded or built is there before the first test.
    assets(&parts)?;
    let start = Instant::now();
    let (conclusion, hosts) = match kvm_host::kvm() {
        Kvm::Host => (here(&arguments, &filters, &times, &parts), String::new()),
        Kvm::NestedHost(reason) if std::env::var_os(VARIABLE).is_some() => {
            return Err(Failure(format!(
                "{VARIABLE} names a device of this machine, which only guests of this machine can have, and tests \
                 run in the nested host: {reason}"
            )));
        }
        Kvm::NestedHost(reason) => {
            eprintln!("fanlight: tests run in the nested host: {reason}");
            let pool = Arc::new(L1Pool::new(setup(&cache, &parts, dir.path())?));
            let trials = trials(&filters, &times, |_| false, {
                let pool = pool.clone();
                move |test| pool.run(test)
            });
            let conclusion = libtest_mimic::run(&arguments, trials);
            (conclusion, format!("{}; ", pool.summary()))
        }
    };
    eprintln!(
        "fanlight: {:.0} s; {hosts}longest: {}",
        start.elapsed().as_secs_f64(),
        times.longest()
    );
    Ok(conclusion.exit_code())
}

/// Runs the tests on this machine's own KVM. Those that pass the nested host's devices through, or change settings of
/// the kernel, are left out; a device of this machine is tried if one is named.
fn here(
    arguments: &Arguments,
    filters: &Filters,
    times: &Arc<Times>,
    parts: &Parts,
) -> libtest_mimic::Conclusion {
    let has_device = std::env::var_os(VARIABLE).is_some();
    let runs = move |test: &TestCase| test.shares_host() || (has_device && test.takes_named_device);
    let tests = tests();
    let run = tests.iter().filter(|test| runs(test)).count();
    eprintln!(
        "fanlight: {run} of {} tests run on this machine's /dev/kvm; those that pass devices through or change settings \
         of the kernel are left out: {}=force runs them in the nested host, {VARIABLE}=ADDRESS tries a device of this \
         machine",
        tests.len(),
        kvm_host::NESTED_HOST
    );
    let parts = parts.clone();
    let host = Arc::new(RwLock::new(()));
    let trials = trials(
        filters,
        times,
        |test| !runs(test),
        move |test| {
            let (_shared, _alone);
            if test.alone {
                _alone = host.write().unwrap_or_else(PoisonError::into_inner);
            } else {
                _shared = host.read().unwrap_or_else(PoisonError::into_inner);
            }
            let mut output = Vec::new();
            let status = test_process::run(command(test.name, parts.clone())?, &mut output);
            let output = String::from_utf8_lossy(&output).into_owned();
            match status {
                Ok(0) => Ok(output),
                Ok(_) => Err(Failure(output)),
                Err(error) => Err(Failure::new(error, output)),
            }
        },
    );
    libtest_mimic::run(arguments, trials)
}

/// What each L1 is started with. `share` is a folder that L1 sees, with the guest's root.
fn setup(cache: &Cache, parts: &Parts, share: &Path) -> Result<Setup> {
    let this = std::env::current_exe().context("cannot find this program")?;
    for (from, to) in [(&this, "e2e"), (&parts.fanlight, "fanlight")] {
        fs::copy(from, share.join(to)).context("cannot share a program")?;
    }
    let shared = |tag, path: &Path| Share {
        tag,
        path: path.into(),
        readonly: true,
    };
    Ok(Setup {
        nested_host: NestedHost::new(
            Emulator::get(cache)?,
            Busybox::get(cache)?,
            L1Kernel::Built(built_kernel(cache)?.bzimage),
        ),
        job: format!("exec /share/e2e {SERVE} /cache /share/fanlight /share/guest.cpio"),
        shares: vec![shared("share", share), shared("cache", cache.root())],
        programs: vec![this, parts.fanlight.clone()],
        logs: env!("CARGO_TARGET_TMPDIR").into(),
    })
}

/// DRM clients that guests run, and what judges EDIDs.
fn graphics_tools(cache: &Cache) -> Result<DebianPrograms> {
    let packages = ["libdrm-tests", "intel-gpu-tools", "edid-decode"];
    DebianPrograms::get(cache, "graphics-tools-1", &packages)
}

fn assets(parts: &Parts) -> Result<Assets> {
    let cache = &Cache::at(&parts.cache);
    let stock = StockKernel::get(cache)?;
    Ok(Assets {
        fanlight: parts.fanlight.clone(),
        drivers: Drivers::get(cache, &stock)?,
        stock,
        built_kernel: built_kernel(cache)?,
        guest_module: guest_module(cache)?,
        emulator: Emulator::get(cache)?,
        clients: ApiClients::get(cache)?,
        compositors: compositors(cache)?,
        graphics_tools: graphics_tools(cache)?,
        graphics: GraphicsStack::get(cache)?,
        older_graphics: GraphicsStack::older(cache)?,
        guest_archive: parts.guest_archive.clone(),
    })
}
