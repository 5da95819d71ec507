//! Boot time, memory and exits of Fanlight beside QEMU, in one run, in turn. Prints the README's table.

use std::{
    fs,
    os::unix::process::CommandExt,
    process::{Command, ExitCode, Stdio},
    time::Instant,
};

use fanlight_tests::{
    Context, Failure, Result,
    host_side::{
        bench::{self, CMDLINE, Paths, median},
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
        Vmm::Q35 | Vmm::Microvm => {
            let machine = if matches!(vmm, Vmm::Q35) {
                "q35"
            } else {
                "microvm"
            };
            let mut command = paths.emulator.command("qemu-system-x86_64");
            command
                .args([
                    "-M", machine, "-accel", "kvm", "-cpu", "host", "-smp", "1", "-m",
                ])
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

fn measure(paths: &Paths, rounds: usize) -> Result<()> {
    let mut samples = vec![Vec::new(); VMMS.len()];
    for round in 0..rounds {
        for (index, (vmm, name)) in VMMS.iter().enumerate() {
            let sample = start_once(command(paths, *vmm))
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
