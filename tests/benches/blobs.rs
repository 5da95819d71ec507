//! Host blobs shown and taken away, with one other shown and with many: in the arena, in a memory slot for each, and
//! by QEMU, all in one run, in turn, with one version of virglrenderer. Prints tables of the book.
//!
//! The guest's side are two programs of `guest-agent`. `serve-blobs` is a client of the stock driver: Linux has no call
//! that shows a blob or takes it away by itself, so that its pair is RESOURCE_CREATE_BLOB, RESOURCE_MAP_BLOB, a mapping
//! that the program makes and writes to, for which the driver waits until the blob is shown, RESOURCE_UNMAP_BLOB and
//! RESOURCE_UNREF. `serve-raw-blobs` is a driver itself, and measures MAP_BLOB and UNMAP_BLOB without the others.

use std::{
    collections::BTreeMap,
    os::unix::process::CommandExt,
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use fanlight_tests::{
    Context, Result, ensure,
    guest_side::raw_gpu::MOST,
    host_side::{
        bench::{self, CMDLINE, Cell, Paths, Table},
        drawing_guest::DrawingGuest,
        guest::{Guest, nested_host_clock},
    },
    nested_host::{
        Archive, Busybox, Cache, GraphicsStack, Modules, StockKernel, build_program, guest_archive,
    },
};
use rustix::process::{Resource, Rlimit, Signal};

const MODULES: &[&str] = &["virtio_pci", "virtio_gpu"];
/// So many others are made before the guest says that it lives.
const STEP: u32 = 100;
/// Pairs before those that count.
const WARM_UP: u32 = 10;
/// Whoever takes longer for all of them is measured with those that it has.
const SETUP: Duration = Duration::from_secs(90);
/// The renderer has a descriptor for each.
const FILES: u64 = 1 << 16;

#[derive(Clone, Copy, Debug)]
enum Vmm {
    Arena,
    Slots,
    Qemu,
}

const VMMS: [Vmm; 3] = [Vmm::Arena, Vmm::Slots, Vmm::Qemu];
const NAMES: [&str; 3] = [
    "Fanlight",
    "Fanlight, `hostmem-slots=on`",
    "QEMU `virtio-gpu-gl-pci`",
];

/// What pairs can be.
#[derive(Clone, Copy)]
struct Kind {
    /// How they are asked for.
    verb: &'static str,
    title: &'static str,
    /// So many times a round.
    times: u32,
    /// Pairs each time.
    pairs: u32,
}

/// What measures in the guest.
struct Program {
    /// What of `guest-agent`.
    verb: &'static str,
    /// What its pairs are.
    title: &'static str,
    kinds: &'static [Kind],
    /// Others that are shown meanwhile. Linux's driver needs minutes for thousands.
    others: [u32; 2],
}

const PROGRAMS: [Program; 2] = [
    Program {
        verb: "serve-raw-blobs",
        title: "MAP_BLOB and UNMAP_BLOB alone",
        kinds: &[
            Kind {
                verb: "pairs",
                title: "a new blob",
                times: 50,
                pairs: 1,
            },
            Kind {
                verb: "again",
                title: "the same blob",
                times: 50,
                pairs: 1,
            },
            Kind {
                verb: "batches",
                title: "64 blobs for one notification",
                times: 5,
                pairs: MOST as u32,
            },
        ],
        others: [1, 10_000],
    },
    Program {
        verb: "serve-blobs",
        title: "by the guest's driver",
        kinds: &[Kind {
            verb: "pairs",
            title: "made, shown and let go",
            times: 30,
            pairs: 1,
        }],
        others: [1, 10_000],
    },
];

fn main() -> ExitCode {
    bench::run(initrd, measure)
}

fn initrd(cache: &Cache) -> Result<Vec<u8>> {
    GraphicsStack::older(cache)?;
    GraphicsStack::of_emulator(cache)?;
    let agent = build_program("fanlight-tests", "guest-agent")?;
    let mut initrd = guest_archive(&Busybox::get(cache)?, None, Some(&agent))?;
    let mut more = Archive::default();
    more.modules(&Modules::find(&StockKernel::get(cache)?.modules)?, MODULES)?;
    // The raw driver has the device for itself.
    let script = "#!/bin/sh\n\
         mount -t sysfs sysfs /sys; mount -t devtmpfs devtmpfs /dev\n\
         raw() {\n\
         gpu=$(dirname $(grep -l 0x1050 /sys/bus/pci/devices/*/device))\n\
         [ -e $gpu/driver ] && echo ${gpu##*/} > $gpu/driver/unbind\n\
         exec guest-agent serve-raw-blobs\n\
         }\n\
         grep -q serve-raw /proc/cmdline && raw\n\
         for module in /modules/*.ko; do insmod $module; done\n\
         exec guest-agent serve-blobs\n";
    more.file("measure", script.as_bytes());
    initrd.extend(more.finish());
    Ok(initrd)
}

/// What runs guests, and on which libraries.
struct Stacks {
    fanlight: GraphicsStack,
    qemu: GraphicsStack,
}

fn command(vmm: Vmm, program: &Program, paths: &Paths, stacks: &Stacks) -> Command {
    let cmdline = format!("{CMDLINE}{} {}", nested_host_clock(), program.verb);
    let mut command = match vmm {
        Vmm::Arena | Vmm::Slots => {
            let slots = matches!(vmm, Vmm::Slots);
            let more = if slots { ",hostmem-slots=on" } else { "" };
            let mut command = stacks.fanlight.command(&paths.fanlight());
            command
                .args([
                    "run",
                    "--on-reset",
                    "exit",
                    "--cpus",
                    "1",
                    "--memory",
                    "512M",
                    "--gpu",
                ])
                .arg(format!("outputs=640x480,renderer=venus{more}"))
                .args(["--cmdline", &cmdline, "--kernel"])
                .arg(paths.kernel())
                .arg("--initrd")
                .arg(paths.initrd());
            command
        }
        Vmm::Qemu => {
            let mut command = stacks.qemu.command("/usr/bin/qemu-system-x86_64".as_ref());
            command
                .env("LIBGL_ALWAYS_SOFTWARE", "true")
                .args(["-M", "q35,memory-backend=ram", "-accel", "kvm"])
                .args(["-cpu", "host", "-smp", "1", "-m", "512M", "-object"])
                .arg("memory-backend-memfd,id=ram,size=512M,share=on")
                .args(["-nodefaults", "-no-user-config", "-vga", "none"])
                .args(["-display", "egl-headless", "-device"])
                .arg("virtio-gpu-gl-pci,blob=on,venus=on,hostmem=256M")
                .args(["-serial", "stdio", "-no-reboot"])
                .args(["-append", &cmdline, "-kernel"])
                .arg(paths.kernel())
                .arg("-initrd")
                .arg(paths.initrd());
            command
        }
    };
    command.stderr(Stdio::piped()).process_group(0);
    command
}

/// A guest, and what its rounds showed.
struct Run {
    name: &'static str,
    drawing: DrawingGuest,
    /// Others that are shown.
    others: u32,
    /// The most that were shown, by how many were wanted.
    had: BTreeMap<u32, u32>,
    /// The emulator of the nested host now and then ends a guest; what it showed before counts.
    is_lost: bool,
    /// Pairs a second, by what they are and how many others were wanted.
    rates: BTreeMap<(&'static str, u32), Vec<f64>>,
}

impl Run {
    fn start(command: Command, name: &'static str) -> Result<Self> {
        let dir = tempfile::tempdir().context("cannot make a directory")?;
        let mut guest = Guest::spawn(command, dir)?;
        guest.wait_for("agent: ready")?;
        Ok(Self {
            name,
            drawing: DrawingGuest::new(guest),
            others: 0,
            had: BTreeMap::new(),
            is_lost: false,
            rates: BTreeMap::new(),
        })
    }

    /// Has so many others shown, or as many as there is time for.
    fn have_others(&mut self, wanted: u32) -> Result<()> {
        let start = Instant::now();
        while self.others < wanted && start.elapsed() < SETUP {
            self.others = wanted.min(self.others + STEP);
            self.drawing.ask(&format!("others {}", self.others))?;
        }
        self.had.insert(wanted, self.others);
        let took = start.elapsed().as_secs_f64();
        eprintln!("{}: {} others in {took:.0} s", self.name, self.others);
        Ok(())
    }

    fn round(&mut self, kind: &Kind, others: u32) -> Result<()> {
        let Kind { verb, times, .. } = kind;
        let said = self.drawing.ask(&format!("{verb} {times}"))?;
        let rate = f64::from(times * kind.pairs) / said[0] * 1e6;
        eprintln!(
            "{}, {verb}, {others} others: {rate:.0} pairs a second",
            self.name
        );
        self.rates.entry((verb, others)).or_default().push(rate);
        Ok(())
    }

    /// Does something as long as there is a guest.
    fn go_on(&mut self, with: impl FnOnce(&mut Self) -> Result<()>) {
        if !self.is_lost
            && let Err(error) = with(self)
        {
            eprintln!("{} is lost: {error}", self.name);
            self.is_lost = true;
        }
    }

    fn cell(&self, what: &'static str, others: u32) -> Cell {
        match self.rates.get(&(what, others)) {
            Some(rates) => Cell::Figures(rates.clone()),
            None => Cell::Failed,
        }
    }
}

fn measure(paths: &Paths, rounds: usize) -> Result<()> {
    let files = Rlimit {
        current: Some(FILES),
        maximum: Some(FILES),
    };
    rustix::process::setrlimit(Resource::Nofile, files).context("cannot allow open files")?;
    let stacks = Stacks {
        // Of the same version as QEMU's.
        fanlight: GraphicsStack::older(&paths.cache)?,
        qemu: GraphicsStack::of_emulator(&paths.cache)?,
    };
    stacks.fanlight.show([])?;
    stacks.qemu.show([])?;
    let mut lost = Vec::new();
    for program in &PROGRAMS {
        lost.extend(measure_program(program, rounds, paths, &stacks)?);
    }
    ensure(lost.is_empty(), format!("lost: {}", lost.join(", ")))
}

/// Measures and prints, and returns the names of those that were lost.
fn measure_program(
    program: &Program,
    rounds: usize,
    paths: &Paths,
    stacks: &Stacks,
) -> Result<Vec<&'static str>> {
    let mut runs = VMMS
        .iter()
        .zip(NAMES)
        .map(|(vmm, name)| Run::start(command(*vmm, program, paths, stacks), name))
        .collect::<Result<Vec<_>>>()?;
    for others in program.others {
        for run in &mut runs {
            run.go_on(|run| {
                run.have_others(others)?;
                for Kind { verb, pairs, .. } in program.kinds {
                    let times = WARM_UP.div_ceil(*pairs);
                    run.drawing.ask(&format!("{verb} {times}"))?;
                }
                Ok(())
            });
        }
        for _ in 0..rounds {
            for run in &mut runs {
                for kind in program.kinds {
                    run.go_on(|run| run.round(kind, others));
                }
            }
        }
    }
    let mut table = Table::new(&NAMES, [0, 2]);
    for others in program.others {
        for Kind { verb, title, .. } in program.kinds {
            let cells = runs.iter().map(|run| run.cell(verb, others)).collect();
            table.row(
                &format!(
                    "{}: {title}, {others} others, pairs a second",
                    program.title
                ),
                "",
                0,
                cells,
            );
        }
        let had = runs.iter().map(|run| match run.had.get(&others) {
            Some(had) => Cell::Figures(vec![f64::from(*had)]),
            None => Cell::Failed,
        });
        let what = format!("others that there were, of {others}");
        table.row(&what, "", 0, had.collect());
    }
    println!("{}", table.text());
    for run in &runs {
        // One that is lost has ended.
        let _ = run.drawing.guest.signal(Signal::KILL);
    }
    let lost = runs.iter().filter(|run| run.is_lost);
    Ok(lost.map(|run| run.name).collect())
}
