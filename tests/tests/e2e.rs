//! End-to-end tests: stock guests on a real KVM, which is this host's, or the nested host's.
//!
//! In the nested host each test has an L1 of its own, which runs this very program again; so a test is plain code
//! that starts `fanlight` and looks at what guest and host see, and none can disturb another.

mod e2e {
    pub mod api;
    pub mod boot;
    pub mod compositor;
    pub mod console;
    pub mod disk;
    pub mod dmabuf;
    pub mod drm;
    pub mod gpu;
    pub mod input;
    pub mod life;
    pub mod network;
    pub mod render;
    pub mod topology;
    pub mod touch_screen;
    pub mod vfio;
    pub mod view;
    pub mod virtual_input;
    pub mod vram;
    pub mod window;
}

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use e2e::vfio::hardware::{self, VARIABLE};
use fanlight_tests::{
    Context, Failure, HANG, Result,
    host_side::{
        guest::Assets,
        kvm_host::{self, Kvm},
    },
    nested_host::{
        ApiClients, Busybox, Cache, DebianPrograms, Drivers, Emulator, GraphicsStack, L1Device,
        L1Kernel, Modules, NestedHost, Share, StockKernel, build_program, built_kernel,
        cpu_watchdog, guest_archive, guest_module,
    },
};
use libtest_mimic::{Arguments, Trial};

/// A test: what it needs is in the assets.
type Test = fn(&Assets) -> Result<()>;

fn tests() -> Vec<(&'static str, Test)> {
    let groups = [
        e2e::api::life::TESTS,
        e2e::api::hotplug::TESTS,
        e2e::api::clients::TESTS,
        e2e::api::events::TESTS,
        e2e::api::handover::TESTS,
        e2e::api::ctl::TESTS,
        e2e::boot::TESTS,
        e2e::console::TESTS,
        e2e::disk::TESTS,
        e2e::gpu::TESTS,
        e2e::drm::TESTS,
        e2e::dmabuf::TESTS,
        e2e::input::TESTS,
        e2e::life::TESTS,
        e2e::network::TESTS,
        e2e::render::TESTS,
        e2e::topology::TESTS,
        e2e::view::TESTS,
        e2e::window::TESTS,
        e2e::vfio::TESTS,
        hardware::TESTS,
        e2e::vram::TESTS,
    ];
    groups.concat()
}

/// What a test's L1 has to pass through.
fn l1_devices(name: &str) -> Vec<L1Device> {
    [
        e2e::vfio::l1_devices(name),
        hardware::l1_devices(name),
        e2e::dmabuf::l1_devices(name),
        e2e::vram::l1_devices(name),
    ]
    .concat()
}

/// On this machine's own KVM: tests of the nested host's devices are left out, and a device of this machine's is tried if
/// one is named.
fn trials_here(assets: Assets) -> Vec<Trial> {
    let has_device = std::env::var_os(VARIABLE).is_some();
    if !has_device {
        eprintln!(
            "fanlight: tests that pass devices through are left out: {}=force has them run in the nested host, \
             {VARIABLE}=ADDRESS tries a device of this machine's",
            kvm_host::NESTED_HOST
        );
    }
    let is_left_out = move |name: &str| {
        let tries_it = has_device && !hardware::l1_devices(name).is_empty();
        !tries_it && !l1_devices(name).is_empty()
    };
    tests()
        .into_iter()
        .map(|(name, test)| {
            let assets = assets.clone();
            Trial::test(name, move || {
                test(&assets).map_err(|error| error.to_string().into())
            })
            .with_ignored_flag(is_left_out(name))
        })
        .collect()
}

fn trials(run: impl Fn(&'static str, Test) -> Result<()> + Clone + Send + 'static) -> Vec<Trial> {
    tests()
        .into_iter()
        .map(|(name, test)| {
            let run = run.clone();
            Trial::test(name, move || {
                run(name, test).map_err(|error| error.to_string().into())
            })
        })
        .collect()
}

fn main() -> ExitCode {
    if std::env::var_os(kvm_host::IN_NESTED_HOST).is_some() {
        return in_nested_host();
    }
    let mut arguments = Arguments::from_args();
    if arguments.list {
        let trials = trials(|_, _| Err(Failure("only listed".into())));
        return libtest_mimic::run(&arguments, trials).exit_code();
    }
    // An emulated host keeps a processor and a half of this machine's busy.
    arguments.test_threads.get_or_insert(2);
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("fanlight: the end-to-end tests cannot run: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the one test that is named.
fn in_nested_host() -> ExitCode {
    let name = std::env::args().nth(1).unwrap_or_default();
    cpu_watchdog::watch();
    let result = assets(
        &Cache::at("/cache"),
        Path::new("/share/fanlight"),
        Path::new("/share/guest.cpio"),
    )
    .and_then(|assets| {
        let test = tests().into_iter().find(|(other, _)| *other == name);
        let (_, test) = test.ok_or_else(|| Failure(format!("there is no test {name:?}")))?;
        test(&assets)
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let cache = Cache::open()?;
    let fanlight = build_program("fanlight", "fanlight")?;
    let agent = build_program("fanlight-tests", "guest-agent")?;
    let modules = Modules::find(&StockKernel::get(&cache)?.modules)?;
    let archive = guest_archive(&Busybox::get(&cache)?, Some(&modules), Some(&agent))?;
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let guest_cpio = dir.path().join("guest.cpio");
    fs::write(&guest_cpio, archive).context("cannot write the guest's root")?;
    let trials = match kvm_host::kvm() {
        Kvm::Host => {
            // Taps and addresses of the tests are nobody else's.
            // SAFETY: a network namespace changes nothing that the program's memory depends on.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
                .context("cannot make a network namespace for the tests; run them as root")?;
            trials_here(assets(&cache, &fanlight, &guest_cpio)?)
        }
        Kvm::NestedHost(reason) if std::env::var_os(VARIABLE).is_some() => {
            return Err(Failure(format!(
                "{VARIABLE} names a device of this machine's, which only guests of its own can have, and tests run \
                 in the nested host: {reason}"
            )));
        }
        Kvm::NestedHost(reason) => {
            eprintln!("fanlight: tests run in the nested host: {reason}");
            let nested_hosts = Arc::new(NestedHosts::new(&cache, &fanlight, dir.path())?);
            trials(move |name, _| nested_hosts.run(name))
        }
    };
    Ok(libtest_mimic::run(arguments, trials).exit_code())
}

/// The compositors that viewers are tried in.
fn compositors(cache: &Cache) -> Result<DebianPrograms> {
    DebianPrograms::get(cache, "compositors-1", &["weston", "sway"])
}

/// DRM clients that guests run, and what judges EDIDs.
fn graphics_tools(cache: &Cache) -> Result<DebianPrograms> {
    let packages = ["libdrm-tests", "intel-gpu-tools", "edid-decode"];
    DebianPrograms::get(cache, "graphics-tools-1", &packages)
}

fn assets(cache: &Cache, fanlight: &Path, guest_archive: &Path) -> Result<Assets> {
    let stock = StockKernel::get(cache)?;
    Ok(Assets {
        fanlight: fanlight.into(),
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
        guest_archive: guest_archive.into(),
    })
}

/// How often a test is tried whose L1 failed: the emulator crashes now and then under nested guests, and
/// that says nothing of the test. A test that fails by itself is never tried again.
const TRIES: usize = 4;
/// What voids a run: a processor of L1 stood still; or a guest was silent for minutes, as it is when the
/// emulator lost its timer, or a socket of the test's was (`EAGAIN`), behind which a guest is. A guest that
/// hangs each time hangs.
const EMULATOR_FAULTS: [&str; 3] = [
    cpu_watchdog::STANDSTILL,
    HANG,
    "Resource temporarily unavailable (os error 11)",
];

/// Keeps what was said in a run that was void, for who wants to know why; where.
fn keep(name: &str, tries: usize, output: &str) -> Result<String> {
    let name = name.replace("::", "-");
    let path = format!("{}/{name}-{tries}.log", env!("CARGO_TARGET_TMPDIR"));
    fs::write(&path, output).context(format!("cannot write {path}"))?;
    Ok(path)
}

/// What the nested hosts of all tests have in common.
struct NestedHosts {
    nested_host: NestedHost,
    this: PathBuf,
    fanlight: PathBuf,
    shares: [Share; 2],
}

impl NestedHosts {
    fn new(cache: &Cache, fanlight: &Path, share: &Path) -> Result<Self> {
        let this = std::env::current_exe().context("cannot find this program")?;
        let kernel = built_kernel(cache)?;
        guest_module(cache)?;
        Drivers::get(cache, &StockKernel::get(cache)?)?;
        ApiClients::get(cache)?;
        compositors(cache)?;
        graphics_tools(cache)?;
        GraphicsStack::older(cache)?;
        for (from, to) in [(&*this, "e2e"), (fanlight, "fanlight")] {
            fs::copy(from, share.join(to)).context("cannot share a program")?;
        }
        let shared = |tag, path: &Path| Share {
            tag,
            path: path.into(),
            readonly: true,
        };
        Ok(Self {
            nested_host: NestedHost::new(
                Emulator::get(cache)?,
                Busybox::get(cache)?,
                L1Kernel::Built(kernel.bzimage),
            ),
            this,
            fanlight: fanlight.into(),
            shares: [shared("share", share), shared("cache", cache.root())],
        })
    }

    fn run(&self, name: &str) -> Result<()> {
        let programs = [&*self.this, &*self.fanlight];
        let devices = l1_devices(name);
        let mut tries = 0;
        loop {
            let mut output = Vec::new();
            let job = format!("exec /share/e2e {name}");
            let result = self.nested_host.run_with(
                &devices,
                &job,
                &programs,
                &self.shares,
                &mut output,
                |_| Ok(()),
            );
            let output = String::from_utf8_lossy(&output);
            tries += 1;
            match result {
                Ok(0) => return Ok(()),
                Ok(_) => match EMULATOR_FAULTS.iter().find(|fault| output.contains(*fault)) {
                    Some(fault) if tries < TRIES => {
                        let log = keep(name, tries, &output)?;
                        eprintln!("fanlight: {name}: {fault}; tried again ({log})");
                    }
                    _ => return Err(Failure(output.into_owned())),
                },
                Err(error) if tries == TRIES => return Err(Failure::new(error, output)),
                Err(error) => {
                    let log = keep(name, tries, &output)?;
                    eprintln!("fanlight: {name}: {error}; tried again ({log})");
                }
            }
        }
    }
}
