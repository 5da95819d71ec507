//! What benchmarks have in common: they run where guests can run, compare VMMs in turn in one run, and print a
//! table of the book.

use std::{
    fmt::Debug,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use rustix::thread::UnshareFlags;

use crate::{
    Context, Failure, Result,
    host_side::{
        kvm_host::{self, Kvm},
        test_process,
    },
    nested_host::{
        Busybox, Cache, Emulator, L1Device, L1Kernel, NestedHost, Share, StockKernel, built_kernel,
        program_under_test,
    },
};

/// Default number of rounds, of which medians are taken; [`ROUNDS`] overrides it.
const DEFAULT_ROUNDS: usize = 5;
const ROUNDS: &str = "FANLIGHT_BENCH_ROUNDS";
/// The command line of every guest.
pub const CMDLINE: &str = "console=ttyS0 panic=-1 quiet";

/// Guest files, all in memory so that no VMM waits for a disk.
pub struct Paths {
    dir: tempfile::TempDir,
    /// The VMM that Fanlight is compared with.
    pub emulator: Emulator,
    /// Other downloads, read over the share.
    pub cache: Cache,
}

impl Paths {
    fn in_memory(cache: Cache, share: &Path) -> Result<Self> {
        let dir = tempfile::tempdir().context("cannot make a directory")?;
        for name in [FANLIGHT, INITRD] {
            fs::copy(share.join(name), dir.path().join(name)).context("cannot copy")?;
        }
        fs::copy(StockKernel::get(&cache)?.image, dir.path().join(KERNEL))
            .context("cannot copy the kernel")?;
        let emulator = Emulator::get(&cache)?.copied_to(&dir.path().join("emulator"))?;
        Ok(Self {
            dir,
            emulator,
            cache,
        })
    }

    /// The program `fanlight`.
    pub fn fanlight(&self) -> PathBuf {
        self.dir.path().join(FANLIGHT)
    }

    /// Debian's kernel.
    pub fn kernel(&self) -> PathBuf {
        self.dir.path().join(KERNEL)
    }

    /// The guest's root.
    pub fn initrd(&self) -> PathBuf {
        self.dir.path().join(INITRD)
    }
}

const FANLIGHT: &str = "fanlight";
const KERNEL: &str = "vmlinuz";
const INITRD: &str = "guest.cpio";

/// Runs `measure` with the number of rounds, on this machine or in the nested host. `initrd` makes the guest's root.
/// The environment variable `FANLIGHT_BENCH_ROUNDS` is for development of a benchmark.
pub fn run(
    initrd: impl FnOnce(&Cache) -> Result<Vec<u8>>,
    measure: impl FnOnce(&Paths, usize) -> Result<()>,
) -> ExitCode {
    run_with(&[], initrd, measure)
}

/// The two VMMs that most benchmarks compare.
#[derive(Clone, Copy, Debug)]
pub enum Vmm {
    /// Fanlight.
    Fanlight,
    /// QEMU.
    Qemu,
}

impl Vmm {
    /// Both, in the order of their turns.
    pub const BOTH: [Self; 2] = [Self::Fanlight, Self::Qemu];
}

/// Runs a step that the emulator may disturb, up to three times, and prints the result.
pub fn tried<T: Debug>(what: &str, run: impl Fn() -> Result<T>) -> Result<T> {
    const TRIES: usize = 3;
    let mut tries = 0;
    loop {
        tries += 1;
        match run() {
            Ok(found) => {
                eprintln!("{what}: {found:.2?}");
                return Ok(found);
            }
            Err(error) if tries == TRIES => return Err(Failure::new(what, error)),
            Err(error) => eprintln!("{what}: {error}; tried again"),
        }
    }
}

/// The same for a benchmark that passes these devices through. They are devices of the nested host, so it always runs
/// there.
pub fn run_with(
    devices: &[L1Device],
    initrd: impl FnOnce(&Cache) -> Result<Vec<u8>>,
    measure: impl FnOnce(&Paths, usize) -> Result<()>,
) -> ExitCode {
    prepare(devices, initrd, measure).unwrap_or_else(|error| {
        eprintln!("fanlight: the benchmark cannot run: {error}");
        ExitCode::FAILURE
    })
}

fn prepare(
    devices: &[L1Device],
    initrd: impl FnOnce(&Cache) -> Result<Vec<u8>>,
    measure: impl FnOnce(&Paths, usize) -> Result<()>,
) -> Result<ExitCode> {
    let rounds = rounds()?;
    if std::env::var_os(kvm_host::IN_NESTED_HOST).is_some() {
        let paths = Paths::in_memory(Cache::at("/cache"), Path::new("/share"))?;
        return measure(&paths, rounds).map(|()| ExitCode::SUCCESS);
    }
    let cache = Cache::open()?;
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let fanlight = program_under_test()?;
    fs::copy(&fanlight, dir.path().join(FANLIGHT)).context("cannot share a program")?;
    let initrd = initrd(&cache)?;
    fs::write(dir.path().join(INITRD), initrd).context("cannot write the guest's root")?;
    StockKernel::get(&cache)?;
    let emulator = Emulator::get(&cache)?;
    if devices.is_empty() && kvm_host::kvm() == Kvm::Host {
        // Mounts that a benchmark makes go with it. Only root can make any.
        if rustix::process::geteuid().is_root() {
            test_process::own_mounts(UnshareFlags::empty())?;
        }
        let paths = Paths::in_memory(cache, dir.path())?;
        return measure(&paths, rounds).map(|()| ExitCode::SUCCESS);
    }
    if !devices.is_empty() && std::env::var(kvm_host::NESTED_HOST).as_deref() == Ok("never") {
        let nested_host = kvm_host::NESTED_HOST;
        return Err(Failure(format!(
            "it needs devices of the nested host, which {nested_host}=never forbids"
        )));
    }
    let kernel = built_kernel(&cache)?;
    let this = std::env::current_exe().context("cannot find this program")?;
    fs::copy(&this, dir.path().join("bench")).context("cannot share a program")?;
    let busybox = Busybox::get(&cache)?;
    let nested_host = NestedHost::new(emulator, busybox, L1Kernel::Built(kernel.bzimage));
    let share = |tag, path: &Path| Share {
        tag,
        path: path.into(),
        readonly: true,
    };
    let shares = [share("share", dir.path()), share("cache", cache.root())];
    let code = nested_host.run_with(
        devices,
        &format!("{ROUNDS}={rounds} exec /share/bench"),
        &[&this, &fanlight],
        &shares,
        &mut std::io::stdout(),
        |_| Ok(()),
    )?;
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

fn rounds() -> Result<usize> {
    let Ok(text) = std::env::var(ROUNDS) else {
        return Ok(DEFAULT_ROUNDS);
    };
    let rounds = text.parse().ok().filter(|rounds| *rounds > 0);
    rounds.ok_or_else(|| {
        Failure(format!(
            "{ROUNDS} is {text:?}: set it to a number from 1 up"
        ))
    })
}

/// The median of one figure of all samples.
pub fn median<T>(samples: &[T], of: impl Fn(&T) -> f64) -> f64 {
    let mut values: Vec<f64> = samples.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_one() {
        assert_eq!(median(&[3, 1, 2], |&value| f64::from(value)), 2.0);
        assert!(median::<f64>(&[], |&value| value).is_nan());
    }
}
