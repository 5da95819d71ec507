//! Boot time, memory and exits of Fanlight beside QEMU, in one run, in turn. Prints the README's table.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, ExitCode, Stdio},
    time::Instant,
};

use fanlight_tests::{
    Context, Failure, Result,
    bed::{
        Bed, Busybox, Cache, Emulator, L1Kernel, Share, StockKernel, bed_kernel, build_program,
        guest_archive,
    },
    guest::Guest,
    host::{self, Kvm},
};
use rustix::process::Signal;

/// Rounds; medians are of so many.
const ROUNDS: usize = 5;
const CMDLINE: &str = "console=ttyS0 panic=-1 quiet";
/// What the guest's init says first.
const MARK: &str = "fanlight-init: up";
/// Memory of the guest, in MiB.
const MEMORY: u64 = 512;

fn main() -> ExitCode {
    // cargo passes --bench; a filter means nothing here.
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("fanlight: the benchmark cannot run: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode> {
    if std::env::var_os(host::IN_BED).is_some() {
        let cache = Cache::at("/cache");
        let paths = Paths::in_memory(&cache, Path::new("/share"))?;
        return measure(&paths).map(|()| ExitCode::SUCCESS);
    }
    let cache = Cache::open()?;
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let fanlight = build_program("fanlight", "fanlight")?;
    fs::copy(&fanlight, dir.path().join("fanlight")).context("cannot share a program")?;
    let mut initrd = guest_archive(&Busybox::get(&cache)?, None, None)?;
    // The guest stays where it is while its VMM is measured.
    let mut more = fanlight_tests::bed::Archive::default();
    more.file("measure", b"#!/bin/sh\nexec sleep 1000\n");
    initrd.extend(more.finish());
    fs::write(dir.path().join("guest.cpio"), initrd).context("cannot write the guest's root")?;
    StockKernel::get(&cache)?;
    let emulator = Emulator::get(&cache)?;
    if host::kvm() == Kvm::Host {
        let paths = Paths::in_memory(&cache, dir.path())?;
        return measure(&paths).map(|()| ExitCode::SUCCESS);
    }
    let kernel = bed_kernel(&cache)?;
    let this = std::env::current_exe().context("cannot find this program")?;
    fs::copy(&this, dir.path().join("bench")).context("cannot share a program")?;
    let bed = Bed::new(
        emulator,
        Busybox::get(&cache)?,
        L1Kernel::Bed(kernel.bzimage),
    );
    let shares = [
        Share {
            tag: "share",
            path: dir.path().into(),
            readonly: true,
        },
        Share {
            tag: "cache",
            path: cache.root().into(),
            readonly: true,
        },
    ];
    let code = bed.run(
        "exec /share/bench",
        &[&this, &fanlight],
        &shares,
        &mut std::io::stdout(),
        |_| Ok(()),
    )?;
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

/// Programs and images, all in memory, so that no VMM waits for a disk.
struct Paths {
    dir: tempfile::TempDir,
    emulator: Emulator,
}

impl Paths {
    fn in_memory(cache: &Cache, share: &Path) -> Result<Self> {
        let dir = tempfile::tempdir().context("cannot make a directory")?;
        for name in ["fanlight", "guest.cpio"] {
            fs::copy(share.join(name), dir.path().join(name)).context("cannot copy")?;
        }
        fs::copy(StockKernel::get(cache)?.image, dir.path().join("vmlinuz"))
            .context("cannot copy the kernel")?;
        let emulator = Emulator::get(cache)?.copied_to(&dir.path().join("emulator"))?;
        Ok(Self { dir, emulator })
    }

    fn at(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, vmm: Vmm) -> Command {
        let mut command = match vmm {
            Vmm::Fanlight | Vmm::FanlightPacked => {
                let mut command = Command::new(self.at("fanlight"));
                command
                    .args(["run", "--log", "info", "--cpus", "1", "--memory"])
                    .arg(format!("{MEMORY}M"));
                if matches!(vmm, Vmm::FanlightPacked) {
                    command.args(["--unpack", "guest"]);
                }
                command
                    .arg("--kernel")
                    .arg(self.at("vmlinuz"))
                    .arg("--initrd")
                    .arg(self.at("guest.cpio"))
                    .args(["--cmdline", CMDLINE]);
                command
            }
            Vmm::Q35 | Vmm::Microvm => {
                let machine = if matches!(vmm, Vmm::Q35) {
                    "q35"
                } else {
                    "microvm"
                };
                let mut command = self.emulator.command("qemu-system-x86_64");
                command
                    .args([
                        "-M", machine, "-accel", "kvm", "-cpu", "host", "-smp", "1", "-m",
                    ])
                    .arg(format!("{MEMORY}M"))
                    .args(["-nodefaults", "-no-user-config", "-display", "none"])
                    .args(["-serial", "stdio", "-no-reboot"])
                    .arg("-kernel")
                    .arg(self.at("vmlinuz"))
                    .arg("-initrd")
                    .arg(self.at("guest.cpio"))
                    .args(["-append", CMDLINE]);
                command
            }
        };
        command.stderr(Stdio::piped()).process_group(0);
        command
    }
}

#[derive(Clone, Copy, Debug)]
enum Vmm {
    Fanlight,
    FanlightPacked,
    Q35,
    Microvm,
}

const VMMS: [(Vmm, &str); 4] = [
    (Vmm::Fanlight, "Fanlight"),
    (Vmm::FanlightPacked, "Fanlight, `--unpack guest`"),
    (Vmm::Q35, "QEMU q35"),
    (Vmm::Microvm, "QEMU microvm"),
];

/// What one start showed.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    /// Seconds from exec to the first line of the guest's init.
    boot: f64,
    /// Seconds from the start of the program to its first vCPU, where it says so.
    first_run: Option<f64>,
    /// Proportional set size of all mappings but guest RAM, in KiB.
    memory: f64,
    /// Exits to user space until the init.
    exits: f64,
}

fn measure(paths: &Paths) -> Result<()> {
    let mut samples = vec![Vec::new(); VMMS.len()];
    for round in 0..ROUNDS {
        for (index, (vmm, name)) in VMMS.iter().enumerate() {
            let sample = start_once(paths.command(*vmm))
                .map_err(|error| Failure::new(format!("{name}, round {round}"), error))?;
            eprintln!("{name}: {sample:?}");
            samples[index].push(sample);
        }
    }
    let base = median(&samples[2], |sample| sample.boot);
    println!(
        "| VMM | exec to init | of q35 | start to first vCPU | memory beyond guest RAM | exits to user space |"
    );
    println!("|---|---|---|---|---|---|");
    for ((_, name), samples) in VMMS.iter().zip(&samples) {
        let boot = median(samples, |sample| sample.boot);
        let first = match samples[0].first_run {
            Some(_) => format!(
                "{:.3} s",
                median(samples, |sample| sample.first_run.unwrap_or(0.0))
            ),
            None => "–".into(),
        };
        println!(
            "| {name} | {boot:.2} s | {:.2} | {first} | {:.1} MB | {:.0} |",
            boot / base,
            median(samples, |sample| sample.memory) / 1000.0 * 1.024,
            median(samples, |sample| sample.exits),
        );
    }
    Ok(())
}

fn median(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> f64 {
    let mut values: Vec<f64> = samples.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn start_once(command: Command) -> Result<Sample> {
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let start = Instant::now();
    let mut guest = Guest::spawn(command, dir)?;
    guest.wait_for(MARK)?;
    let boot = start.elapsed().as_secs_f64();
    let memory = memory_beyond_ram(guest.pid())?;
    let exits = userspace_exits(guest.pid())?;
    let first_run = guest
        .transcript()
        .lines()
        .filter_map(|line| {
            line.split_once("about to run after=")?
                .1
                .split_whitespace()
                .next()
        })
        .find_map(seconds);
    guest.signal(Signal::KILL)?;
    Ok(Sample {
        boot,
        first_run,
        memory,
        exits,
    })
}

/// Rust's debug form of a duration.
fn seconds(text: &str) -> Option<f64> {
    for (unit, factor) in [("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9), ("s", 1.0)] {
        if let Some(number) = text.strip_suffix(unit) {
            return number.parse::<f64>().ok().map(|number| number * factor);
        }
    }
    None
}

/// KiB of all mappings but the one as large as the guest's RAM.
fn memory_beyond_ram(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).context("cannot read smaps")?;
    let mut sum = 0;
    let mut is_ram = false;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("Size:"), Some(size)) => {
                is_ram = size
                    .parse::<u64>()
                    .is_ok_and(|size| size >= MEMORY * 1024 / 2);
            }
            (Some("Pss:"), Some(size)) if !is_ram => sum += size.parse::<u64>().unwrap_or(0),
            _ => {}
        }
    }
    Ok(sum as f64)
}

/// KVM's own counters of port and memory-mapped accesses that left for user space, from debugfs.
fn userspace_exits(pid: u32) -> Result<f64> {
    let vms = fs::read_dir("/sys/kernel/debug/kvm").context("cannot read KVM's counters")?;
    let vm = vms
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(&format!("{pid}-")))
        })
        .ok_or_else(|| Failure(format!("KVM has no counters of process {pid}")))?;
    let read = |name: &str| {
        fs::read_to_string(vm.join(name))
            .ok()
            .and_then(|text| text.trim().parse::<f64>().ok())
            .ok_or_else(|| Failure(format!("KVM has no counter {name}")))
    };
    Ok(read("io_exits")? + read("mmio_exits")?)
}
