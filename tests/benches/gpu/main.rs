//! The GPU of Fanlight beside QEMU's `virtio-gpu-pci,blob=on`, in one run, in turn: the first frame, flushes,
//! blobs that become dma-bufs, and the copy of a 2D resource. Prints a table of the book.
//!
//! The guest's side is `guest-agent draw`, a client of the stock driver. QEMU has no display attached and gives
//! no descriptor to anybody; it makes its dma-buf while it serves RESOURCE_CREATE_BLOB. Fanlight makes one when it is
//! first asked for.

mod qmp;
mod table;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use fanlight_api::{
    client::Client,
    display::{OutputIndex, ResourceId, Screenshot},
    methods::{GpuExportResource, GpuExportScanout, GpuScreenshot, VmStats},
    types::NoParams,
};
use fanlight_tests::{
    Context, Failure, Result,
    common::pci::Mmio,
    ensure,
    host_side::{
        bench::{self, CMDLINE, Paths, Vmm, median},
        compositor::read_png,
        drawing_guest::DrawingGuest,
        guest::{Guest, nested_host_clock},
        watcher::Watcher,
    },
    nested_host::{Archive, Busybox, Cache, Modules, StockKernel, build_program, guest_archive},
};
use rustix::process::Signal;

use qmp::Qmp;

/// The guest's first picture.
const COLOUR: u32 = 0x0033_6699;
const MODULES: &[&str] = &["virtio_pci", "virtio_gpu"];
/// A frame of the guest's mode: Linux's driver waits for the next one with every update.
const FRAME_US: u32 = 250;
/// Flushes of a round, after some to warm up.
const FLUSHES: u32 = 400;
const WARM_UP: u32 = 20;
/// Blobs of each kind in a round, the median of which counts: the first one takes longer.
const BLOB_TRIES: usize = 5;
/// Transfers of a round, of 1920x1080 pixels.
const TRANSFERS: u32 = 20;
/// udmabuf's limit of pieces, as it is and as it must be for a 4K picture in single pages.
const LIST_LIMIT: &str = "/sys/module/udmabuf/parameters/list_limit";
/// udmabuf's limit of a buffer's size, in MiB.
const SIZE_LIMIT: &str = "/sys/module/udmabuf/parameters/size_limit_mb";
/// Flushes while frames cannot be dma-bufs.
const CONTROL: &str = "1080p, watched, without udmabuf";
const DEFAULT_LIMIT: u32 = 1024;
const RAISED_LIMIT: u32 = 16384;
/// Pages that are neighbours, more than [`DEFAULT_LIMIT`], of which the guest names each alone, where its command
/// line has this word.
const NEIGHBOURS: &str = "neighbours";
const PIECES: u32 = 2048;
/// What QEMU says when the kernel refuses its list.
const REFUSED: &str = "UDMABUF_CREATE_LIST";

const SIZES: [(&str, u16, u16); 2] = [("1080p", 1920, 1080), ("4K", 3840, 2160)];
/// How a 4K picture lies in the guest's memory, as `guest-agent draw` takes it.
const BLOBS: [(&str, &str); 3] = [
    ("contiguous", "contiguous"),
    ("pieces of 64 KiB", "16"),
    ("single pages", "1"),
];

/// How Fanlight's frames are watched, and whether the guest waits for who watches.
const WATCHED: [(&str, bool); 2] = [(", watched", false), (", watched and paced", true)];

/// Those that are tried with the limit that the kernel has by default too.
const LIMITED: [(&str, &str); 2] = [BLOBS[1], BLOBS[2]];

const NAMES: [&str; 2] = ["Fanlight", "QEMU"];

/// Names and figures of one run.
type Figures = BTreeMap<String, f64>;

fn main() -> ExitCode {
    bench::run(initrd, measure)
}

fn initrd(cache: &Cache) -> Result<Vec<u8>> {
    let agent = build_program("fanlight-tests", "guest-agent")?;
    let mut initrd = guest_archive(&Busybox::get(cache)?, None, Some(&agent))?;
    let mut more = Archive::default();
    more.modules(&Modules::find(&StockKernel::get(cache)?.modules)?, MODULES)?;
    let (_, width, height) = SIZES[0];
    let script = format!(
        "#!/bin/sh\nmount -t sysfs sysfs /sys; mount -t devtmpfs devtmpfs /dev\n\
         mount -t proc proc /proc 2>/dev/null\n\
         case $(cat /proc/cmdline) in *{NEIGHBOURS}*) exec guest-agent neighbours {PIECES};; esac\n\
         for module in /modules/*.ko; do insmod $module; done\n\
         exec guest-agent draw {width} {height} {FRAME_US} {COLOUR:x}\n"
    );
    more.file("measure", script.as_bytes());
    initrd.extend(more.finish());
    Ok(initrd)
}

fn measure(paths: &Paths, rounds: usize) -> Result<()> {
    let vmm = |index: usize| Vmm::BOTH[index];
    set_limit(RAISED_LIMIT)?;
    let all = bench::in_turn(rounds, &NAMES, |index| {
        Run::start(vmm(index), paths)?.everything()
    });
    set_limit(DEFAULT_LIMIT)?;
    let limited = bench::in_turn(rounds, &NAMES, |index| {
        Run::start(vmm(index), paths)?.limited()
    });
    let merged = bench::in_turn(1, &NAMES, |index| neighbours(vmm(index), paths));
    println!("{}", table::of(&all, &limited, &merged).text());
    bench::all_came_to_their_end(&NAMES, &all)?;
    bench::all_came_to_their_end(&NAMES, &limited)?;
    bench::all_came_to_their_end(&NAMES, &merged)
}

fn set_limit(limit: u32) -> Result<()> {
    fs::write(LIST_LIMIT, limit.to_string()).context(format!("cannot write {LIST_LIMIT}"))
}

/// Whether pages that the guest names one by one, though they are neighbours, become a dma-buf.
fn neighbours(vmm: Vmm, paths: &Paths) -> Result<bool> {
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let socket = dir.path().join("socket");
    // A driver in a program has the device's registers.
    let cmdline = format!("{} iomem=relaxed {NEIGHBOURS}", cmdline());
    let mut command = command(vmm, paths, &socket, &cmdline);
    command.stderr(Stdio::piped()).process_group(0);
    let mut guest = Guest::spawn(command, dir)?;
    guest.wait_for("agent: made blob 1")?;
    let made = match vmm {
        Vmm::Fanlight => {
            let mut client = Client::connect(&socket).context("cannot connect")?;
            let blob = ResourceId {
                gpu: 0,
                resource: 1,
            };
            client.call_with::<GpuExportResource>(&blob, &[]).is_ok()
        }
        Vmm::Qemu => {
            // Said before the guest's command was answered, and read by another thread.
            thread::sleep(Duration::from_secs(2));
            !guest.transcript().contains(REFUSED)
        }
    };
    guest.signal(Signal::KILL)?;
    Ok(made)
}

/// A guest that paints, and the way to its VMM.
struct Run {
    drawing: DrawingGuest,
    host: Host,
    figures: Figures,
}

enum Host {
    Fanlight(Client),
    Qemu(Qmp),
}

impl Host {
    fn save_picture(&mut self, file: &Path) -> Result<()> {
        match self {
            Self::Fanlight(client) => {
                let request = Screenshot {
                    file: Some(file.into()),
                    ..Screenshot::default()
                };
                let saved = client.call::<GpuScreenshot>(&request);
                saved.map(drop).context("gpu.screenshot")
            }
            Self::Qemu(qmp) => qmp.save_picture(file),
        }
    }
}

impl Run {
    /// Up to the first frame, which lies in a PNG file on the host.
    fn start(vmm: Vmm, paths: &Paths) -> Result<Self> {
        let dir = tempfile::tempdir().context("cannot make a directory")?;
        let (socket, picture) = (dir.path().join("socket"), dir.path().join("picture.png"));
        let mut command = command(vmm, paths, &socket, &cmdline());
        command.stderr(Stdio::piped()).process_group(0);
        let start = Instant::now();
        let mut guest = Guest::spawn(command, dir)?;
        guest.wait_for("agent: shows")?;
        let mut host = match vmm {
            Vmm::Fanlight => Host::Fanlight(Client::connect(&socket).context("cannot connect")?),
            Vmm::Qemu => Host::Qemu(Qmp::connect(&socket)?),
        };
        host.save_picture(&picture)?;
        let mut figures = Figures::from([("first frame".into(), start.elapsed().as_secs_f64())]);
        let pixels = read_png(fs::File::open(&picture).context("there is no picture")?)?;
        let colour = pixels.get(..3).unwrap_or_default();
        ensure(
            colour == &COLOUR.to_be_bytes()[1..],
            format!("the host sees colour {colour:?}"),
        )?;
        if let Host::Fanlight(client) = &mut host {
            let start = Instant::now();
            let colour = exported_pixel(client)?;
            let took = start.elapsed().as_secs_f64() * 1e6;
            ensure(colour == COLOUR, format!("the dma-buf has {colour:06x}"))?;
            figures.insert("first frame exported".into(), took);
        }
        Ok(Self {
            drawing: DrawingGuest::new(guest),
            host,
            figures,
        })
    }

    fn everything(mut self) -> Result<Figures> {
        for (name, width, height) in SIZES {
            self.drawing.ask(&format!("size {width} {height}"))?;
            self.flushes(name)?;
        }
        for (name, run) in BLOBS {
            self.blobs(name, run)?;
        }
        let (_, width, height) = SIZES[0];
        let said = self
            .drawing
            .ask(&format!("transfer {width} {height} {TRANSFERS}"))?;
        self.figures
            .insert("transfer".into(), said[0] / said[1] * 1e6);
        let row = usize::from(width) * 4;
        self.figures
            .insert("memcpy".into(), memcpy(row, usize::from(height)));
        self.without_udmabuf()?;
        self.drawing.guest.signal(Signal::KILL)?;
        Ok(self.figures)
    }

    /// The control of "no byte is copied": a frame that cannot be a dma-buf is copied for who watches.
    fn without_udmabuf(&mut self) -> Result<()> {
        let before = fs::read_to_string(SIZE_LIMIT).context(format!("cannot read {SIZE_LIMIT}"))?;
        fs::write(SIZE_LIMIT, "1").context(format!("cannot write {SIZE_LIMIT}"))?;
        let (_, width, height) = SIZES[0];
        let drawn = self.drawing.ask(&format!("size {width} {height}"));
        let flushed = drawn.and_then(|_| match &mut self.host {
            Host::Qemu(_) => Ok(()),
            Host::Fanlight(client) => {
                let watcher = Watcher::start(client, false)?;
                self.flush_round(CONTROL)?;
                watcher.stop().map(drop)
            }
        });
        fs::write(SIZE_LIMIT, before).context(format!("cannot restore {SIZE_LIMIT}"))?;
        flushed
    }

    /// Only blobs, as many as the kernel may refuse.
    fn limited(mut self) -> Result<Figures> {
        let (_, width, height) = SIZES[1];
        self.drawing.ask(&format!("size {width} {height}"))?;
        for (name, run) in LIMITED {
            self.blobs(name, run)?;
        }
        self.drawing.guest.signal(Signal::KILL)?;
        Ok(self.figures)
    }

    /// Flushes while nobody watches, and then while somebody does. QEMU's are watched by nobody.
    fn flushes(&mut self, size: &str) -> Result<()> {
        self.flush_round(size)?;
        for (how, paces) in WATCHED {
            let Host::Fanlight(client) = &mut self.host else {
                continue;
            };
            let watcher = Watcher::start(client, paces)?;
            self.flush_round(&format!("{size}{how}"))?;
            ensure(watcher.stop()? > 0, "the watcher heard of no flush")?;
        }
        Ok(())
    }

    fn flush_round(&mut self, name: &str) -> Result<()> {
        self.drawing.ask(&format!("flush {WARM_UP}"))?;
        let (before, copied) = (Profile::of(self.drawing.guest.pid())?, self.copied()?);
        let said = self.drawing.ask(&format!("flush {FLUSHES}"))?;
        let spent = Profile::of(self.drawing.guest.pid())?.since(&before);
        let frames = f64::from(FLUSHES);
        let mut note = |what: &str, value: f64| {
            self.figures.insert(format!("{name}: {what}"), value);
        };
        note("flushes", said[0] / said[1] * 1e6);
        note("faults", spent.faults / frames);
        note("processor", spent.processor / frames * 1e6);
        let copied = self.copied()? - copied;
        self.figures
            .insert(format!("{name}: copied"), copied / frames);
        Ok(())
    }

    /// What the VMM counts that it copied.
    fn copied(&mut self) -> Result<f64> {
        let Host::Fanlight(client) = &mut self.host else {
            return Ok(f64::NAN);
        };
        let stats = client.call::<VmStats>(&NoParams {}).context("vm.stats")?;
        let gpu = stats.gpus.first().ok_or(Failure("no GPU".into()))?;
        Ok(gpu.copied as f64)
    }

    /// From RESOURCE_CREATE_BLOB to a descriptor. Nothing is noted if there is none.
    fn blobs(&mut self, name: &str, run: &str) -> Result<()> {
        let blobs = (0..BLOB_TRIES)
            .map(|_| self.blob(run))
            .collect::<Result<Vec<_>>>()?;
        self.figures.insert(
            format!("{name}: pieces"),
            median(&blobs, |blob| blob.pieces),
        );
        let Some(times) = blobs
            .iter()
            .map(|blob| blob.times)
            .collect::<Option<Vec<_>>>()
        else {
            return Ok(());
        };
        let mut note = |what: &str, of: fn(&Times) -> f64| {
            self.figures
                .insert(format!("{name}: {what}"), median(&times, of));
        };
        note("made", |times| times.created + times.first - times.second);
        note("passed on", |times| times.created + times.first);
        Ok(())
    }

    fn blob(&mut self, run: &str) -> Result<Blob> {
        let refused = self.drawing.guest.transcript().matches(REFUSED).count();
        let said = self.drawing.ask(&format!("blob {run}"))?;
        let [id, pieces, created, ..] = said[..] else {
            return Err(Failure(format!("the guest said {said:?}")));
        };
        let times = match &mut self.host {
            Host::Fanlight(client) => {
                let mut export = || -> Option<f64> {
                    let (gpu, resource) = (0, id as u32);
                    let start = Instant::now();
                    let exported =
                        client.call_with::<GpuExportResource>(&ResourceId { gpu, resource }, &[]);
                    let took = start.elapsed().as_secs_f64() * 1e6;
                    exported.is_ok().then_some(took)
                };
                let (first, second) = (export(), export());
                first.zip(second).map(|(first, second)| Times {
                    created,
                    first,
                    second,
                })
            }
            Host::Qemu(_) => {
                let again = self.drawing.guest.transcript().matches(REFUSED).count();
                (again == refused).then_some(Times {
                    created,
                    first: 0.0,
                    second: 0.0,
                })
            }
        };
        self.drawing.ask("drop")?;
        Ok(Blob { pieces, times })
    }
}

/// A blob and, if it became a dma-buf, its times in microseconds.
struct Blob {
    pieces: f64,
    times: Option<Times>,
}

#[derive(Clone, Copy)]
struct Times {
    /// The command.
    created: f64,
    /// The first call for the descriptor, which makes the dma-buf.
    first: f64,
    /// A second one, which passes the same on.
    second: f64,
}

/// Every guest's command line: the emulator must not lose a timer of the guest.
fn cmdline() -> String {
    format!("{CMDLINE}{}", nested_host_clock())
}

fn command(vmm: Vmm, paths: &Paths, socket: &Path, cmdline: &str) -> Command {
    match vmm {
        Vmm::Fanlight => {
            let mut command = Command::new(paths.fanlight());
            command
                .args(["run", "--cpus", "1", "--memory", "1G", "--gpu"])
                .args(["outputs=1920x1080", "--kernel"])
                .arg(paths.kernel())
                .arg("--initrd")
                .arg(paths.initrd())
                .args(["--cmdline", cmdline, "--api-socket"])
                .arg(socket);
            command
        }
        Vmm::Qemu => {
            let mut command = paths.emulator.command("qemu-system-x86_64");
            command
                .args(["-M", "q35,memory-backend=ram", "-accel", "kvm"])
                .args(["-cpu", "host", "-smp", "1", "-m", "1G"])
                .args(["-object", "memory-backend-memfd,id=ram,size=1G,share=on"])
                .args(["-nodefaults", "-no-user-config", "-display", "none"])
                .args([
                    "-vga",
                    "none",
                    "-device",
                    "virtio-gpu-pci,blob=on,xres=1920,yres=1080",
                ])
                .args(["-serial", "stdio", "-no-reboot", "-kernel"])
                .arg(paths.kernel())
                .arg("-initrd")
                .arg(paths.initrd())
                .args(["-append", cmdline, "-qmp"])
                .arg(format!("unix:{},server=on,wait=off", socket.display()));
            command
        }
    }
}

/// The first pixel of what the guest shows, read from its memory.
fn exported_pixel(client: &mut Client) -> Result<u32> {
    let (picture, fds) = client
        .call_with::<GpuExportScanout>(&OutputIndex::default(), &[])
        .context("gpu.export_scanout")?;
    let fd = fds.into_iter().next().ok_or(Failure("no dma-buf".into()))?;
    ensure(picture.offset == 0, "the picture has an offset")?;
    let len = u64::from(picture.stride) * u64::from(picture.height);
    let memory = Mmio::new(&fd.into(), 0, len).context("cannot map the dma-buf")?;
    Ok(memory.read::<u32>(0) & 0x00ff_ffff)
}

/// Bytes a second of the C library's copy, row by row as a transfer copies.
fn memcpy(row: usize, rows: usize) -> f64 {
    let (from, mut to) = (vec![1u8; row * rows], vec![2u8; row * rows]);
    let start = Instant::now();
    for _ in 0..TRANSFERS {
        let from = std::hint::black_box(&from).chunks_exact(row);
        for (from, to) in from.zip(to.chunks_exact_mut(row)) {
            to.copy_from_slice(from);
        }
        std::hint::black_box(&mut to);
    }
    from.len() as f64 * f64::from(TRANSFERS) / start.elapsed().as_secs_f64()
}

/// What a process has used.
struct Profile {
    faults: f64,
    /// Seconds.
    processor: f64,
}

impl Profile {
    fn of(pid: u32) -> Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
        let stat = stat.context("cannot read what the VMM has used")?;
        // The name in parentheses may have spaces; the state follows.
        let (_, rest) = stat.rsplit_once(')').unwrap_or_default();
        let field = |index: usize| -> f64 {
            let word = rest.split_whitespace().nth(index - 3);
            word.and_then(|word| word.parse().ok()).unwrap_or(f64::NAN)
        };
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        Ok(Self {
            faults: field(10) + field(12),
            processor: (field(14) + field(15)) / ticks,
        })
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            faults: self.faults - before.faults,
            processor: self.processor - before.processor,
        }
    }
}
