//! Passed-through devices, by Fanlight beside QEMU in one run, in turn: boot with an SR-IOV VF, interrupts, and what a
//! transfer through the VF costs the VMM; and a 4K picture in a BAR that becomes a dma-buf, beside the bare ioctl.
//! Prints tables of the book.
//!
//! Interrupts are those of `edu`, one after the other, which a program in the guest hears by the guest's own vfio-pci.
//! That needs no IOMMU with the nested host's kernel only, so it is a guest of its own.

mod export;

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    thread,
    time::Instant,
};

use fanlight_tests::{
    Context, Failure, Result,
    common::{
        echo::{self, Address},
        edu,
        pci::Function,
    },
    ensure,
    host_side::{
        bench::{self, CMDLINE, Cell, Paths, Rounds, Table, Vmm},
        guest::{Guest, nested_host_clock},
    },
    nested_host::{
        Archive, Busybox, Cache, L1Device, Modules, StockKernel, build_program, built_kernel,
        guest_archive,
    },
    value,
};
use rustix::{
    process::{Pid, Signal},
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

const DEVICES: &[L1Device] = &[L1Device::Igb, L1Device::Edu, L1Device::Ivshmem(64)];
const IGB: &str = "8086:10c9";
const MODULES: &[&str] = &["virtio_pci", "igbvf"];
/// What the guest's init says first.
const MARK: &str = "fanlight-init: up";
/// The link of a VF is up, where the guest has one.
const SCRIPT: &str = "#!/bin/sh
if ! grep -q noiommu /proc/cmdline; then
    echo 1 > /proc/sys/net/core/high_order_alloc_disable
    until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
    ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up
    until [ \"$(cat /sys/class/net/eth0/carrier 2>/dev/null)\" = 1 ]; do sleep 0.1; done
fi
echo ready; while read -r line; do eval \"$line\"; done
";
/// Bytes of the transfers, which come back too.
const SMALL: u64 = 1 << 20;
const LARGE: u64 = 8 << 20;
const INTERRUPTS: u32 = 2000;
const KINDS: [&str; 2] = ["msi", "intx"];
const NAMES: [&str; 2] = ["Fanlight", "QEMU"];
const NOIOMMU: &str = "vfio.enable_unsafe_noiommu_mode=1";

fn main() -> ExitCode {
    bench::run_with(DEVICES, initrd, measure)
}

fn initrd(cache: &Cache) -> Result<Vec<u8>> {
    let agent = build_program("fanlight-tests", "guest-agent")?;
    let mut initrd = guest_archive(&Busybox::get(cache)?, None, Some(&agent))?;
    let mut more = Archive::default();
    more.modules(&Modules::find(&StockKernel::get(cache)?.modules)?, MODULES)?;
    more.file("test", SCRIPT.as_bytes());
    initrd.extend(more.finish());
    Ok(initrd)
}

/// What a transfer cost.
#[derive(Clone, Copy, Debug)]
struct Cost {
    /// Seconds of processor time of all threads but the vCPUs'.
    processor: f64,
    /// Accesses to ports and device memory.
    exits: f64,
}

/// What one start showed.
#[derive(Clone, Copy, Debug)]
struct Sample {
    /// Seconds from exec to the first line of the guest's init.
    boot: f64,
    small: Cost,
    large: Cost,
    /// A second, of [`KINDS`].
    interrupts: [f64; 2],
}

fn measure(paths: &Paths, rounds: usize) -> Result<()> {
    let physical = Function::only(IGB)?.address();
    let vf = bind(paths, &physical, &["--vfs", "1"])?;
    let edu = bind(paths, &Function::only(edu::IDS)?.address(), &[])?;
    let memory = bind(paths, &Function::only(edu::MEMORY_IDS)?.address(), &[])?;
    let mut exports = Vec::new();
    for _ in 0..rounds {
        exports.push(export::measure(&memory)?);
    }
    // From the next one that is asked for on; the vCPUs will be there too.
    let mask = format!("{:x}", 1_u64 << processor()?);
    fs::write("/proc/irq/default_smp_affinity", mask).context("cannot bind interrupts")?;
    let interface = run(Command::new("ls").arg(format!("/sys/bus/pci/devices/{physical}/net")))?;
    for arguments in [
        ["addr", "add", "10.9.0.1/24", "dev", &interface].as_slice(),
        &["link", "set", &interface, "up"],
    ] {
        run(Command::new("ip").args(arguments))?;
    }
    let built = built_kernel(&Cache::at("/cache"))?.bzimage;
    let samples = bench::in_turn(rounds, &NAMES, |index| {
        let vmm = Vmm::BOTH[index];
        let stock = Start {
            kernel: paths.kernel(),
            device: &vf,
            cmdline: "",
        };
        let (boot, small, large) = transfers(vmm, command(paths, vmm, &stock))?;
        let built = Start {
            kernel: built.clone(),
            device: &edu,
            cmdline: NOIOMMU,
        };
        Ok(Sample {
            boot,
            small,
            large,
            interrupts: interrupts(vmm, command(paths, vmm, &built))?,
        })
    });
    println!(
        "{}\n{}",
        table(&samples).text(),
        export::table(&exports).text()
    );
    bench::all_came_to_their_end(&NAMES, &samples)
}

fn table(samples: &[Rounds<Sample>]) -> Table {
    let mut table = Table::new(&NAMES, [0, 1]);
    let row = |figure: fn(&Sample) -> f64| Cell::row(samples, |sample| Some(figure(sample)));
    table.row("exec to init, with a VF", "s", 2, row(|sample| sample.boot));
    table.row("MSI a second", "", 0, row(|sample| sample.interrupts[0]));
    table.row("INTx a second", "", 0, row(|sample| sample.interrupts[1]));
    cost_rows(&mut table, samples, SMALL, |sample| sample.small);
    cost_rows(&mut table, samples, LARGE, |sample| sample.large);
    table
}

/// What a transfer of so many bytes cost.
fn cost_rows(table: &mut Table, samples: &[Rounds<Sample>], bytes: u64, cost: fn(&Sample) -> Cost) {
    let cells = |figure: fn(Cost) -> f64| Cell::row(samples, |sample| Some(figure(cost(sample))));
    let size = format!("{} MiB both ways", bytes >> 20);
    table.row(
        &format!("processor time of all threads but the vCPU's, {size}"),
        "ms",
        1,
        cells(|cost| cost.processor * 1e3),
    );
    table.row(
        &format!("port and MMIO accesses, {size}"),
        "",
        0,
        cells(|cost| cost.exits),
    );
}

/// What a command prints, which must succeed.
fn run(command: &mut Command) -> Result<String> {
    let output = command.output().context("cannot run a command")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure(output.status.success(), format!("{command:?}: {errors}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn bind(paths: &Paths, address: &str, more: &[&str]) -> Result<String> {
    let mut command = Command::new(paths.fanlight());
    run(command.args(["vfio", "bind", address]).args(more))
}

/// What a guest is started with.
struct Start<'a> {
    kernel: PathBuf,
    device: &'a str,
    /// Added to the kernel's command line.
    cmdline: &'a str,
}

fn command(paths: &Paths, vmm: Vmm, start: &Start) -> Command {
    let Start { kernel, device, .. } = start;
    let cmdline = format!("{CMDLINE}{} {}", nested_host_clock(), start.cmdline);
    let mut command = match vmm {
        Vmm::Fanlight => {
            let mut command = Command::new(paths.fanlight());
            command
                .args(["run", "--cpus", "1", "--memory", "512M"])
                .args(["--vfio", &format!("{device},iommufd=on")])
                .arg("--kernel")
                .arg(kernel)
                .arg("--initrd")
                .arg(paths.initrd())
                .args(["--cmdline", &cmdline]);
            command
        }
        Vmm::Qemu => {
            let mut command = paths.emulator.command("qemu-system-x86_64");
            command
                .args(["-M", "q35", "-accel", "kvm", "-cpu", "host", "-smp", "1"])
                .args(["-m", "512M", "-name", "guest,debug-threads=on"])
                .args(["-nodefaults", "-no-user-config", "-display", "none"])
                .args(["-serial", "stdio", "-no-reboot"])
                .args(["-object", "iommufd,id=iommu"])
                .arg("-device")
                .arg(format!("vfio-pci,host={device},iommufd=iommu"))
                .arg("-kernel")
                .arg(kernel)
                .arg("-initrd")
                .arg(paths.initrd())
                .args(["-append", &cmdline]);
            command
        }
    };
    command.stderr(Stdio::piped()).process_group(0);
    command
}

/// A stock guest with a VF: the time to its init, and what a small and a large transfer cost.
fn transfers(vmm: Vmm, command: Command) -> Result<(f64, Cost, Cost)> {
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let start = Instant::now();
    let mut guest = Guest::spawn(command, dir)?;
    guest.wait_for(MARK)?;
    let boot = start.elapsed().as_secs_f64();
    guest.wait_for("ready")?;
    // Pages that are touched first, and the driver's start.
    transfer(vmm, &mut guest, SMALL, 1)?;
    let small = transfer(vmm, &mut guest, SMALL, 2)?;
    let large = transfer(vmm, &mut guest, LARGE, 1)?;
    guest.signal(Signal::KILL)?;
    guest.exit_status().ok();
    Ok((boot, small, large))
}

/// The first processor that this program may run on.
fn processor() -> Result<usize> {
    let all = sched_getaffinity(None).context("cannot ask for the processors")?;
    let mut numbers = 0..u64::BITS as usize;
    let first = numbers.find(|&number| all.is_set(number));
    first.ok_or_else(|| Failure("none of the first 64 processors may be used".into()))
}

/// Interrupts a second that a guest hears, of [`KINDS`].
///
/// The vCPU is on the processor that the host's interrupts come to: whether they have to go on to another one would be
/// chance otherwise, and matters more than the VMM.
fn interrupts(vmm: Vmm, command: Command) -> Result<[f64; 2]> {
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let mut guest = Guest::spawn(command, dir)?;
    guest.wait_for("ready")?;
    let mut only = CpuSet::new();
    only.set(processor()?);
    for thread in threads(vmm, guest.pid())? {
        if thread.is_vcpu(vmm) {
            sched_setaffinity(Some(thread.id), &only).context("cannot bind a vCPU")?;
        }
    }
    let mut rates = [0.0; 2];
    for (number, (kind, rate)) in (1..).zip(KINDS.into_iter().zip(&mut rates)) {
        guest.send(&format!("guest-agent interrupts {kind} {INTERRUPTS}\n"))?;
        guest.wait_for_times("microseconds", number)?;
        let said = guest.transcript();
        let time = value(&said, &format!("agent: {INTERRUPTS} of {kind} took"))?;
        let time = time.split_whitespace().next();
        let time: f64 = time
            .and_then(|time| time.parse().ok())
            .ok_or_else(|| Failure(format!("no time in {said}")))?;
        *rate = f64::from(INTERRUPTS) / time * 1e6;
    }
    guest.signal(Signal::KILL)?;
    guest.exit_status().ok();
    Ok(rates)
}

/// Has the guest send so many bytes, which come back; `count` is how often it has by then.
fn transfer(vmm: Vmm, guest: &mut Guest, bytes: u64, count: usize) -> Result<Cost> {
    let counters =
        |guest: &Guest| Ok::<_, Failure>((processor_time(vmm, guest.pid())?, exits(guest.pid())?));
    let before = counters(guest)?;
    let server = thread::spawn(|| echo::serve(&Address::Tcp("10.9.0.1:5000".into())));
    guest.send(&format!("guest-agent call tcp:10.9.0.1:5000 {bytes}\n"))?;
    guest.wait_for_times(&format!("called with {bytes} bytes"), count)?;
    let after = counters(guest)?;
    let served = server.join().map_err(|_| Failure("a panic".into()))??;
    ensure(served == bytes, format!("{served} bytes came"))?;
    Ok(Cost {
        processor: after.0 - before.0,
        exits: after.1 - before.1,
    })
}

/// A thread of a VMM.
struct Thread {
    id: Pid,
    dir: PathBuf,
    name: String,
}

impl Thread {
    fn is_vcpu(&self, vmm: Vmm) -> bool {
        self.name.starts_with(match vmm {
            Vmm::Fanlight => "vcpu",
            Vmm::Qemu => "CPU ",
        })
    }
}

/// The threads of a VMM with one vCPU.
fn threads(vmm: Vmm, pid: u32) -> Result<Vec<Thread>> {
    let list = "cannot list threads";
    let mut all = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task")).context(list)? {
        let dir = entry.context(list)?.path();
        let id = dir.file_name().unwrap_or_default().to_string_lossy();
        let id = id.parse().ok().and_then(Pid::from_raw);
        // A thread may have ended meanwhile.
        if let (Some(id), Ok(name)) = (id, fs::read_to_string(dir.join("comm"))) {
            all.push(Thread { id, dir, name });
        }
    }
    let vcpus = all.iter().filter(|thread| thread.is_vcpu(vmm)).count();
    ensure(vcpus == 1, format!("{vcpus} threads are vCPUs"))?;
    Ok(all)
}

/// Processor time of the threads of a VMM without its vCPU, in seconds.
fn processor_time(vmm: Vmm, pid: u32) -> Result<f64> {
    let mut nanoseconds = 0.0;
    for thread in threads(vmm, pid)? {
        if thread.is_vcpu(vmm) {
            continue;
        }
        let Ok(times) = fs::read_to_string(thread.dir.join("schedstat")) else {
            continue;
        };
        let time = times.split_whitespace().next();
        nanoseconds += time
            .and_then(|time| time.parse::<f64>().ok())
            .ok_or_else(|| Failure(format!("no time in schedstat: {times:?}")))?;
    }
    Ok(nanoseconds / 1e9)
}

/// KVM's counters of port and MMIO accesses (debugfs), those included that the kernel handles itself.
fn exits(pid: u32) -> Result<f64> {
    let vms = fs::read_dir("/sys/kernel/debug/kvm").context("cannot read KVM's counters")?;
    let is_it = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(&format!("{pid}-"))
    };
    let vm = vms
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| is_it(path))
        .ok_or_else(|| Failure(format!("KVM has no counters of process {pid}")))?;
    let read = |name: &str| {
        let text = fs::read_to_string(vm.join(name)).ok()?;
        text.trim().parse::<f64>().ok()
    };
    let sum = read("io_exits").zip(read("mmio_exits"));
    sum.map(|(io, mmio)| io + mmio)
        .ok_or_else(|| Failure("KVM does not count exits".into()))
}
