//! Boot time, memory and exits of Fanlight beside QEMU, in one run, in turn. Prints a table of the book.

use std::{
    fs,
    os::unix::process::CommandExt,
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use fanlight_tests::{
    Context, Failure, Result,
    host_side::{
        bench::{self, CMDLINE, Cell, Paths, Table},
        guest::Guest,
    },
    nested_host::{Archive, Busybox, Cache, guest_archive},
};
use rustix::process::Signal;

/// What the guest's init says first.
const MARK: &str = "fanlight-init: up";
/// Memory of the guest, in MiB.
const MEMORY: u64 = 512;

fn main() -> ExitCode {
    bench::run(initrd, measure)
}

fn initrd(cache: &Cache) -> Result<Vec<u8>> {
    let mut initrd = guest_archive(&Busybox::get(cache)?, None, None)?;
    // The guest stays where it is while its VMM is measured.
    let mut more = Archive::default();
    more.file("measure", b"#!/bin/sh\nexec sleep 1000\n");
    initrd.extend(more.finish());
    Ok(initrd)
}

fn command(paths: &Paths, vmm: Vmm) -> Command {
    let mut command = match vmm {
        Vmm::Fanlight | Vmm::FanlightPacked => {
            let mut command = Command::new(paths.fanlight());
            command
                .args(["run", "--log", "info", "--cpus", "1", "--memory"])
                .arg(format!("{MEMORY}M"));
            if matches!(vmm, Vmm::FanlightPacked) {
                command.args(["--unpack", "guest"]);
            }
            command
                .arg("--kernel")
                .arg(paths.kernel())
                .arg("--initrd")
                .arg(paths.initrd())
                .args(["--cmdline", CMDLINE]);
            command
        }
        Vmm::Q35 | Vmm::Microvm | Vmm::LeanMicrovm => {
            let machine = match vmm {
                Vmm::Microvm => "microvm",
                Vmm::LeanMicrovm => LEAN_MICROVM,
                _ => "q35",
            };
            let mut command = paths.emulator.command("qemu-system-x86_64");
            command
                .args(["-M", machine, "-accel", "kvm", "-cpu", "host", "-smp", "1"])
                .arg("-m")
                .arg(format!("{MEMORY}M"))
                .args(["-nodefaults", "-no-user-config", "-display", "none"])
                .args(["-serial", "stdio", "-no-reboot"])
                .arg("-kernel")
                .arg(paths.kernel())
                .arg("-initrd")
                .arg(paths.initrd())
                .args(["-append", CMDLINE]);
            command
        }
    };
    command.stderr(Stdio::piped()).process_group(0);
    command
}

/// QEMU's own advice for a fast start (`docs/system/i386/microvm.rst`): no interrupt controller, timer and clock of a PC.
/// Its option ROMs stay: without them the firmware reads the kernel by ports, with 900,000 exits and no end in sight.
const LEAN_MICROVM: &str = "microvm,pit=off,pic=off,isa-serial=on,rtc=off,auto-kernel-cmdline=off";

#[derive(Clone, Copy, Debug)]
enum Vmm {
    Fanlight,
    FanlightPacked,
    Q35,
    Microvm,
    LeanMicrovm,
}

const VMMS: [Vmm; 5] = [
    Vmm::Fanlight,
    Vmm::FanlightPacked,
    Vmm::Q35,
    Vmm::Microvm,
    Vmm::LeanMicrovm,
];
const NAMES: [&str; 5] = [
    "Fanlight",
    "Fanlight, `--unpack guest`",
    "QEMU q35",
    "QEMU microvm",
    "QEMU microvm, lean",
];

/// What one start showed.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    /// Seconds from exec to the first line of the guest's init.
    boot: f64,
    /// Seconds from the start of the program to its first vCPU, where it says so.
    first_run: Option<f64>,
    /// Proportional set size of all mappings but guest RAM, in MB.
    memory: f64,
    /// Accesses to ports and device memory until the init, wherever they were handled.
    exits: f64,
}

/// How long a guest idles before its VMM's memory is looked at again.
const IDLE: Duration = Duration::from_secs(60);

fn measure(paths: &Paths, rounds: usize) -> Result<()> {
    let samples = bench::in_turn(rounds, &NAMES, |index| {
        start_once(command(paths, VMMS[index]))
    });
    // All of them idle at the same time.
    let mut later: Vec<_> = VMMS.map(|_| Vec::new()).into();
    for _ in 0..rounds {
        for (memory, later) in memory_after_idling(paths)?.into_iter().zip(&mut later) {
            later.extend(memory);
        }
    }
    let mut table = Table::new(&NAMES, [0, 2]);
    let row = |figure: fn(&Sample) -> Option<f64>| Cell::row(&samples, figure);
    table.row("exec to init", "s", 2, row(|sample| Some(sample.boot)));
    table.row(
        "start of the program to the first vCPU",
        "s",
        3,
        row(|sample| sample.first_run),
    );
    table.row(
        "memory beyond guest RAM at init",
        "MB",
        1,
        row(|sample| Some(sample.memory)),
    );
    table.row(
        "the same after the guest idled for a minute",
        "MB",
        1,
        later
            .into_iter()
            .map(|figures: Vec<f64>| match figures.is_empty() {
                true => Cell::Failed,
                false => Cell::Figures(figures),
            })
            .collect(),
    );
    table.row(
        "port and MMIO accesses until init",
        "",
        0,
        row(|sample| Some(sample.exits)),
    );
    println!("{}", table.text());
    bench::all_came_to_their_end(&NAMES, &samples)
}

/// Memory beyond RAM of each VMM, in MB, after its guest has idled. None if its guest did not start.
fn memory_after_idling(paths: &Paths) -> Result<Vec<Option<f64>>> {
    let start = |vmm| {
        let dir = tempfile::tempdir().context("cannot make a directory")?;
        let mut guest = Guest::spawn(command(paths, vmm), dir)?;
        guest.wait_for(MARK)?;
        Ok::<_, Failure>(guest)
    };
    let guests: Vec<_> = VMMS
        .into_iter()
        .map(|vmm| {
            let started = start(vmm);
            started
                .inspect_err(|error| eprintln!("{vmm:?}, to idle, failed: {error}"))
                .ok()
        })
        .collect();
    thread::sleep(IDLE);
    let memory = |guest: &Option<Guest>| {
        let Some(guest) = guest else { return Ok(None) };
        let memory = memory_beyond_ram(guest.pid())?;
        guest.signal(Signal::KILL)?;
        Ok(Some(memory))
    };
    guests.iter().map(memory).collect()
}

fn start_once(command: Command) -> Result<Sample> {
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let start = Instant::now();
    let mut guest = Guest::spawn(command, dir)?;
    guest.wait_for(MARK)?;
    let boot = start.elapsed().as_secs_f64();
    let memory = memory_beyond_ram(guest.pid())?;
    let exits = accesses(guest.pid())?;
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

/// MB of all mappings but the one as large as the guest's RAM.
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
    Ok(sum as f64 * 1.024e-3)
}

/// KVM's counters of port and MMIO accesses (debugfs), those included that the kernel handles itself.
fn accesses(pid: u32) -> Result<f64> {
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
