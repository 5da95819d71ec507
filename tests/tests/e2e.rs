//! End-to-end tests: stock guests on a real KVM, which is this host's, or the bed's.
//!
//! The bed runs this very program again, with the same arguments; so a test is plain code that starts
//! `fanlight` and looks at what guest and host see.

mod e2e {
    pub mod boot;
    pub mod console;
    pub mod disk;
    pub mod input;
    pub mod life;
    pub mod network;
    pub mod topology;
}

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use fanlight_tests::{
    Context, Failure, Result,
    bed::{
        Bed, Busybox, Cache, Emulator, L1Kernel, Modules, Share, StockKernel, bed_kernel,
        build_program, guest_archive,
    },
    guest::Assets,
    host::{self, Kvm},
};
use libtest_mimic::{Arguments, Trial};

/// A test: what it needs is in the assets.
type Test = fn(&Assets) -> Result<()>;

fn tests() -> Vec<(&'static str, Test)> {
    let groups = [
        e2e::boot::TESTS,
        e2e::console::TESTS,
        e2e::disk::TESTS,
        e2e::input::TESTS,
        e2e::life::TESTS,
        e2e::network::TESTS,
        e2e::topology::TESTS,
    ];
    groups.concat()
}

fn trials(assets: Option<&Assets>) -> Vec<Trial> {
    tests()
        .into_iter()
        .map(|(name, test)| {
            let assets = assets.cloned();
            Trial::test(name, move || {
                let assets = assets.ok_or("not to be run")?;
                test(&assets).map_err(|error| error.to_string().into())
            })
        })
        .collect()
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if arguments.list {
        return libtest_mimic::run(&arguments, trials(None)).exit_code();
    }
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("fanlight: the end-to-end tests cannot run: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    if std::env::var_os(host::IN_BED).is_some() {
        let assets = assets(
            &Cache::at("/cache"),
            Path::new("/share/fanlight"),
            Path::new("/share/guest.cpio"),
        )?;
        return Ok(libtest_mimic::run(arguments, trials(Some(&assets))).exit_code());
    }
    let cache = Cache::open()?;
    let fanlight = build_program("fanlight", "fanlight")?;
    let agent = build_program("fanlight-tests", "guest-agent")?;
    let modules = Modules::find(&StockKernel::get(&cache)?.modules)?;
    let archive = guest_archive(&Busybox::get(&cache)?, Some(&modules), Some(&agent))?;
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let guest_cpio = dir.path().join("guest.cpio");
    fs::write(&guest_cpio, archive).context("cannot write the guest's root")?;
    match host::kvm() {
        Kvm::Host => {
            // Taps and addresses of the tests are nobody else's.
            // SAFETY: a network namespace changes nothing that the program's memory depends on.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
                .context("cannot make a network namespace for the tests; run them as root")?;
            let assets = assets(&cache, &fanlight, &guest_cpio)?;
            Ok(libtest_mimic::run(arguments, trials(Some(&assets))).exit_code())
        }
        Kvm::Bed(reason) => {
            eprintln!("fanlight: tests run in the bed: {reason}");
            let code = in_bed(&cache, &fanlight, dir.path())?;
            Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
        }
    }
}

fn assets(cache: &Cache, fanlight: &Path, guest_archive: &Path) -> Result<Assets> {
    Ok(Assets {
        fanlight: fanlight.into(),
        stock: StockKernel::get(cache)?,
        bed: bed_kernel(cache)?,
        emulator: Emulator::get(cache)?,
        guest_archive: guest_archive.into(),
    })
}

/// Runs this program in the bed with the arguments that it has; its exit status there.
fn in_bed(cache: &Cache, fanlight: &Path, share: &Path) -> Result<i32> {
    let this: PathBuf = std::env::current_exe().context("cannot find this program")?;
    let kernel = bed_kernel(cache)?;
    for (from, to) in [(&*this, "e2e"), (fanlight, "fanlight")] {
        fs::copy(from, share.join(to)).context("cannot share a program")?;
    }
    let quoted: Vec<String> = std::env::args()
        .skip(1)
        .map(|argument| format!("'{}'", argument.replace('\'', "'\\''")))
        .collect();
    let job = format!("exec /share/e2e {}", quoted.join(" "));
    let bed = Bed::new(
        Emulator::get(cache)?,
        Busybox::get(cache)?,
        L1Kernel::Bed(kernel.bzimage),
    );
    let shares = [
        Share {
            tag: "share",
            path: share.into(),
            readonly: true,
        },
        Share {
            tag: "cache",
            path: cache.root().into(),
            readonly: true,
        },
    ];
    bed.run(&job, &[&this, fanlight], &shares, |_| Ok(()))
        .map_err(|error| Failure::new("the bed", error))
}
