//! What benchmarks have in common: they run where guests can run, compare VMMs in turn in one run, and print a
//! table of the book.

mod book;
mod origin;
mod table;

pub use table::{Cell, Table};

use std::{
    fmt::Debug,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use rustix::thread::UnshareFlags;

use crate::{
    Context, Failure, Result, ensure,
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

/// The rounds of a VMM.
#[derive(Clone, Debug)]
pub struct Rounds<T> {
    /// What those showed that came to their end.
    pub samples: Vec<T>,
    /// How many did not.
    pub failed: usize,
}

/// Measures each of `names` once a round, in turn. A round that fails is told, counted, and not replaced.
pub fn in_turn<T: Debug>(
    rounds: usize,
    names: &[&str],
    mut measure: impl FnMut(usize) -> Result<T>,
) -> Vec<Rounds<T>> {
    let none = || Rounds {
        samples: Vec::new(),
        failed: 0,
    };
    let mut all: Vec<_> = names.iter().map(|_| none()).collect();
    for round in 1..=rounds {
        for (index, (name, rounds)) in names.iter().zip(&mut all).enumerate() {
            match measure(index) {
                Ok(sample) => {
                    eprintln!("{name}, round {round}: {sample:.2?}");
                    rounds.samples.push(sample);
                }
                Err(error) => {
                    eprintln!("{name}, round {round}, failed: {error}");
                    rounds.failed += 1;
                }
            }
        }
    }
    all
}

/// Fails if a round of one of `names` did, after the tables were printed.
pub fn all_came_to_their_end<T>(names: &[&str], all: &[Rounds<T>]) -> Result<()> {
    let failed: Vec<_> = names
        .iter()
        .zip(all)
        .filter(|(_, rounds)| rounds.failed > 0)
        .map(|(name, rounds)| format!("{} of {name}", rounds.failed))
        .collect();
    ensure(
        failed.is_empty(),
        format!("rounds failed: {}", failed.join(", ")),
    )
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
        if book::is_wanted() {
            let nested_host = kvm_host::NESTED_HOST;
            return Err(Failure(format!(
                "the book has figures of the nested host: set {nested_host}=force too"
            )));
        }
        // Mounts that a benchmark makes go with it. Only root can make any.
        if rustix::process::geteuid().is_root() {
            test_process::own_mounts(UnshareFlags::empty())?;
        }
        let paths = Paths::in_memory(cache, dir.path())?;
        println!("{}\n", origin::line("the host's KVM", rounds)?);
        return measure(&paths, rounds).map(|()| ExitCode::SUCCESS);
    }
    if !devices.is_empty() && std::env::var(kvm_host::NESTED_HOST).as_deref() == Ok("never") {
        let nested_host = kvm_host::NESTED_HOST;
        return Err(Failure(format!(
            "it needs devices of the nested host, which {nested_host}=never forbids"
        )));
    }
    let kernel = built_kernel(&cache)?;
    let key = kernel.bzimage.parent().and_then(Path::file_name);
    let host = format!("nested host `{}`", key.unwrap_or_default().display());
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
    let origin = origin::line(&host, rounds)?;
    println!("{origin}\n");
    let mut output = book::Output::default();
    let code = nested_host.run_with(
        devices,
        &format!("{ROUNDS}={rounds} exec /share/bench"),
        &[&this, &fanlight],
        &shares,
        &mut output,
        |_| Ok(()),
    )?;
    if code == 0 {
        let name = this.file_stem().unwrap_or_default().to_string_lossy();
        // Cargo adds a hash.
        let name = name.rsplit_once('-').map_or(&*name, |(name, _)| name);
        output.bless(name, &origin)?;
    }
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
