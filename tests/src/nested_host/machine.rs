//! L1 itself: QEMU with a processor that virtualizes, running one job.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tempfile::TempDir;

use super::{Archive, Busybox, Emulator, Modules, StockKernel};
use crate::{Context, Failure, Result};

/// Start of the last line of L1.
const STATUS: &str = "fanlight-nested-host: status ";
/// Modules that make the Debian kernel a KVM host, and let it mount directories of this machine.
const L1_MODULES: &[&str] = &[
    "kvm",
    "kvm_amd",
    "tun",
    "vhost_net",
    "vhost_vsock",
    "virtio_pci",
    "9pnet_virtio",
    "9p",
];
/// Number of processors of L1: two that run guests, and the first one, which must not.
///
/// When any processor loads an x87 state (XRSTOR and the like, at nearly each change of threads), QEMU clears a bit in
/// the state of the *first* processor (`cpu_clear_ignne`, `hflags2`). It reads, changes and writes back without a lock,
/// and so undoes what the first processor changes meanwhile: whether it uses the page tables of a guest, or whether its
/// interrupts are on. L1 then looked up its next instruction in the page tables of the guest, or the reverse: it ended
/// without a word, guests restarted, or hung. A processor that never enters a guest is not affected.
const PROCESSORS: u32 = 3;
/// Mask of the processors that guests and tests run on (`resources/nested_host/init`).
const GUESTS_PROCESSORS: u32 = (1 << PROCESSORS) - 2;
/// Command line of L1, made for the faults of the emulator and for busy machines:
///
/// - `nohz=off highres=off`: the emulator now and then loses a one-shot timer while a nested guest runs. Without a
///   periodic tick L1, or a guest in it, then sleeps until something else happens.
/// - `tsc=reliable`: all time stamp counters are the one of this machine. On a busy machine the clock watchdog of L1 would
///   doubt them, and KVM with it.
/// - `kvm.tsc_tolerance_ppm`: the rate that Linux measures first may be 250 ppm from the second measurement. The processor
///   cannot scale, so `kvm_set_tsc_khz` would fail half way and leave guests a scale of zero: their clocks leap.
/// - `no_timer_check`: on a busy machine the emulated PIT may not tick ten times while L1 checks it, which is a panic.
/// - `hugepages`: a page of 1 GiB can only be had at the start.
const L1_CMDLINE: &str = "console=ttyS0 panic=-1 loglevel=1 intel_iommu=on nohz=off highres=off no_timer_check \
     tsc=reliable default_hugepagesz=2M hugepagesz=1G hugepages=1 kvm.tsc_tolerance_ppm=20000";
/// L1 sends [`ALIVE`] every ten seconds (`resources/nested_host/init`). One that is silent for so long hangs.
const SILENCE: Duration = Duration::from_secs(120);
const ALIVE: u8 = 0;

/// Which kernel L1 boots.
#[derive(Debug)]
pub enum L1Kernel {
    /// The kernel that is built for it, with everything built in.
    Built(PathBuf),
    /// The Debian kernel, with what it needs as modules.
    Stock(StockKernel),
}

/// A device of L1 for guests, beyond what every L1 has. Each is behind a root port of its own, and so in an IOMMU group
/// of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L1Device {
    /// Intel's 82576 (8086:10c9) with virtual functions (8086:10ca), on a network of QEMU.
    Igb,
    /// A virtio network device (1af4:1041) with a virtual function of the same kind, on one network.
    VirtioNet,
    /// Shared memory (1af4:1110): BAR 2 is this many MiB of memory.
    Ivshmem(u32),
    /// A display (1234:1111) whose BAR 0 is 16 MiB of memory.
    BochsDisplay,
    /// A disk controller (8086:2922) with MSI and INTx, and a disk of 16 MiB.
    Ahci,
    /// A device for teaching (1234:11e8) with a DMA engine and INTx.
    Edu,
    /// A disk of 16 MiB with a write cache, which L1 itself drives as `/dev/vda`.
    VirtioDisk,
}

impl L1Device {
    /// The QEMU arguments for it as device number `number` of L1. Files go to `dir`.
    fn arguments(self, number: usize, dir: &Path) -> Result<Vec<String>> {
        let port = format!("pcie-root-port,id=rp{number},chassis={number},slot={number}");
        let drive = || {
            let disk = dir.join(format!("disk{number}"));
            let file = fs::File::create(&disk).context("cannot make a disk")?;
            file.set_len(16 << 20).context("cannot make a disk")?;
            let disk = disk.display();
            Ok(format!("if=none,id=disk{number},format=raw,file={disk}"))
        };
        let on_port = |device: &str| format!("{device},bus=rp{number}");
        let mut arguments = vec!["-device".into(), port];
        let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
        match self {
            L1Device::Igb => {
                add("-netdev", format!("user,id=net{number},restrict=on"));
                add("-device", on_port(&format!("igb,netdev=net{number}")));
            }
            // QEMU wants the virtual function before the physical one that it names. Without `iommu_platform`
            // DMA of a virtio device passes by the IOMMU, and lands in L1 memory instead of guest memory.
            L1Device::VirtioNet => {
                for (end, device) in [
                    ("v", format!("sriov-pf=pf{number},addr=0.1")),
                    ("p", format!("id=pf{number},addr=0.0")),
                ] {
                    let net = format!("net{number}{end}");
                    add("-netdev", format!("hubport,id={net},hubid={number}"));
                    let device = format!("virtio-net-pci,{device},netdev={net},iommu_platform=on");
                    add("-device", on_port(&device));
                }
            }
            L1Device::Ivshmem(mib) => {
                let memory = format!("memory-backend-memfd,id=shm{number},size={mib}M,share=on");
                add("-object", memory);
                add(
                    "-device",
                    on_port(&format!("ivshmem-plain,memdev=shm{number}")),
                );
            }
            L1Device::Ahci => {
                add("-drive", drive()?);
                add("-device", on_port(&format!("ahci,id=ahci{number}")));
                add(
                    "-device",
                    format!("ide-hd,drive=disk{number},bus=ahci{number}.0"),
                );
            }
            L1Device::BochsDisplay => add("-device", on_port("bochs-display")),
            L1Device::Edu => add("-device", on_port("edu,dma_mask=0xffffffffffffffff")),
            L1Device::VirtioDisk => {
                add("-drive", drive()?);
                let device = format!("virtio-blk-pci,drive=disk{number}");
                add("-device", on_port(&device));
            }
        }
        Ok(arguments)
    }
}

/// A directory of this machine that L1 mounts. Nothing else changes it while L1 runs.
#[derive(Clone, Debug)]
pub struct Share {
    /// `/share` or `/cache` in L1.
    pub tag: &'static str,
    /// The directory.
    pub path: PathBuf,
    /// Whether L1 may only read.
    pub readonly: bool,
}

/// The parts of a nested host, which runs jobs.
#[derive(Debug)]
pub struct NestedHost {
    emulator: Emulator,
    busybox: Busybox,
    kernel: L1Kernel,
    /// Memory of L1 in MiB.
    pub memory: u32,
}

impl NestedHost {
    /// A nested host of these parts.
    pub fn new(emulator: Emulator, busybox: Busybox, kernel: L1Kernel) -> Self {
        Self {
            emulator,
            busybox,
            kernel,
            memory: 8192,
        }
    }

    /// Boots L1, runs the shell script `job` in it and returns its exit status. The output goes to `output` as it comes.
    /// `fill` adds files to the root of L1. `programs` are programs of this machine that the job runs: L1 gets their
    /// libraries.
    pub fn run(
        &self,
        job: &str,
        programs: &[&Path],
        shares: &[Share],
        output: &mut dyn Write,
        fill: impl FnOnce(&mut Archive) -> Result<()>,
    ) -> Result<i32> {
        self.run_with(&[], job, programs, shares, output, fill)
    }

    /// The same with more devices in L1.
    pub fn run_with(
        &self,
        devices: &[L1Device],
        job: &str,
        programs: &[&Path],
        shares: &[Share],
        output: &mut dyn Write,
        fill: impl FnOnce(&mut Archive) -> Result<()>,
    ) -> Result<i32> {
        self.start(devices, job, programs, shares, Stdio::null(), fill)?
            .wait(output)
    }

    /// Boots L1 and runs the shell script `job` in it, which reads `input`.
    pub fn start(
        &self,
        devices: &[L1Device],
        job: &str,
        programs: &[&Path],
        shares: &[Share],
        input: Stdio,
        fill: impl FnOnce(&mut Archive) -> Result<()>,
    ) -> Result<Running> {
        let dir = tempfile::tempdir().context("cannot make a directory")?;
        let mut root = Archive::l1(&self.busybox)?;
        root.file("job", format!("#!/bin/sh\n{job}\n").as_bytes());
        for program in programs {
            root.libraries_of(program)?;
        }
        let image = match &self.kernel {
            L1Kernel::Built(image) => image,
            L1Kernel::Stock(kernel) => {
                root.modules(&Modules::find(&kernel.modules)?, L1_MODULES)?;
                &kernel.image
            }
        };
        fill(&mut root)?;
        let initrd = dir.path().join("l1.cpio");
        fs::write(&initrd, root.finish()).context("cannot write the root of L1")?;
        let mut command = self.command(image, &initrd, shares);
        for (number, device) in (1..).zip(devices) {
            command.args(device.arguments(number, dir.path())?);
        }
        let child = command.stdin(input).spawn().context("cannot start QEMU")?;
        Ok(Running { child, _dir: dir })
    }

    fn command(&self, image: &Path, initrd: &Path, shares: &[Share]) -> Command {
        let mut command = self.emulator.command("qemu-system-x86_64");
        command
            .args([
                "-machine",
                "q35,kernel-irqchip=split",
                "-accel",
                "tcg,thread=multi",
            ])
            .args(["-device", "intel-iommu,intremap=on"])
            .args(["-cpu", "EPYC-v4,+svm,+npt"])
            .args(["-smp", &PROCESSORS.to_string()])
            .args(["-m", &format!("{}M", self.memory)])
            .args(["-nodefaults", "-vga", "none", "-display", "none"])
            .args(["-serial", "stdio", "-no-reboot"])
            .arg("-monitor")
            .arg(monitor())
            .arg("-kernel")
            .arg(image)
            .arg("-initrd")
            .arg(initrd)
            .arg("-append")
            .arg(format!(
                "{L1_CMDLINE} irqaffinity=1-{} fanlight.processors={GUESTS_PROCESSORS:x}",
                PROCESSORS - 1
            ));
        for share in shares {
            command.arg("-virtfs").arg(format!(
                "local,path={},mount_tag={},security_model=none{}",
                share.path.display(),
                share.tag,
                if share.readonly { ",readonly=on" } else { "" }
            ));
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: prctl is async-signal-safe, as what runs between fork and exec must be.
        unsafe {
            command.pre_exec(|| {
                // A test that is interrupted leaves no emulator behind.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        command
    }
}

/// L1 while it runs. The emulator ends with the thread that started it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    _dir: TempDir,
}

impl Running {
    /// A handle by which any thread can kill the emulator.
    pub fn handle(&self) -> Result<OwnedFd> {
        pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())
            .context("cannot have a handle of QEMU")
    }

    /// Passes L1's output on until it ends; the exit status of its job.
    pub fn wait(self, output: &mut dyn Write) -> Result<i32> {
        watch(self.child, output)
    }
}

/// A folder for monitor sockets of the emulators, which tell where a machine hangs.
const MONITORS: &str = "FANLIGHT_NESTED_HOST_MONITORS";

/// The monitor option of this emulator.
fn monitor() -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let Some(folder) = std::env::var_os(MONITORS) else {
        return "none".into();
    };
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("{}-{number}", std::process::id());
    let path = Path::new(&folder).join(name);
    format!("unix:{},server=on,wait=off", path.display())
}

/// Passes the output of L1 on until it ends, and returns the status in its last line.
fn watch(mut child: Child, to: &mut dyn Write) -> Result<i32> {
    let (Some(output), Some(errors)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(Failure("QEMU has no output".into()));
    };
    let errors = thread::spawn(move || emulator_errors(errors));
    let ended = Arc::new(AtomicBool::new(false));
    let heard = Arc::new(Mutex::new(Instant::now()));
    let output = Listening {
        output,
        heard: heard.clone(),
    };
    let watchdog = thread::spawn({
        let ended = ended.clone();
        let pid = rustix::process::Pid::from_child(&child);
        move || {
            while !ended.load(Ordering::Acquire) {
                let heard = *heard.lock().unwrap_or_else(PoisonError::into_inner);
                if heard.elapsed() > SILENCE {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                    return true;
                }
                thread::park_timeout(Duration::from_millis(500));
            }
            false
        }
    });
    let status = pass_on(output, to);
    let exit = child.wait().context("cannot wait for QEMU")?;
    ended.store(true, Ordering::Release);
    watchdog.thread().unpark();
    let killed = watchdog.join().unwrap_or(false);
    let errors = errors.join().unwrap_or_default();
    match status {
        Some(status) => Ok(status),
        None if killed => Err(Failure(format!(
            "the nested host was stopped: it was silent for {SILENCE:?}"
        ))),
        None => Err(Failure::new(
            format!("the nested host ended without a result (QEMU: {exit})"),
            errors.trim(),
        )),
    }
}

/// The output of L1 without its signs of life, whose time it notes.
struct Listening<R> {
    output: R,
    heard: Arc<Mutex<Instant>>,
}

impl<R: Read> Read for Listening<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.output.read(bytes)?;
            *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
            let mut kept = 0;
            for at in 0..read {
                if bytes[at] != ALIVE {
                    bytes[kept] = bytes[at];
                    kept += 1;
                }
            }
            // Nothing would mean the end.
            if kept > 0 || read == 0 {
                return Ok(kept);
            }
        }
    }
}

/// Copies whole and partial lines as they come, except the one with the status.
fn pass_on(output: impl Read, to: &mut dyn Write) -> Option<i32> {
    let mut reader = BufReader::new(output);
    let mut status = None;
    let mut line = Vec::new();
    while reader
        .read_until(b'\n', &mut line)
        .is_ok_and(|read| read > 0)
    {
        let text = String::from_utf8_lossy(&line);
        match text.trim().strip_prefix(STATUS) {
            Some(number) => status = number.parse().ok(),
            None => {
                let text = text.replace("\r\n", "\n");
                let _ = to.write_all(text.as_bytes());
                let _ = to.flush();
            }
        }
        line.clear();
    }
    status
}

/// The errors of QEMU, without those about processor features that it does not emulate.
fn emulator_errors(errors: impl Read) -> String {
    BufReader::new(errors)
        .lines()
        .map_while(std::result::Result::ok)
        .filter(|line| !line.contains("TCG doesn't support requested feature"))
        .collect::<Vec<_>>()
        .join(" / ")
}
