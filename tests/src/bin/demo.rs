//! `cargo demo`: boots a stock Debian kernel, shows its console and takes a picture of its display, on any machine.
//! On a machine without KVM this program runs itself again in the nested host. `cargo demo -- --window` shows the
//! display in a window of `fanlight view` too, and takes a picture of that.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use fanlight_api::{client::Client, display::Screenshot, methods::GpuScreenshot};
use fanlight_tests::{
    Context, Failure, Result,
    host_side::{
        compositor::{Compositor, PATIENCE, compositors, read_png},
        kvm_host::{self, Kvm},
    },
    nested_host::{
        Archive, Busybox, Cache, DebianPrograms, Emulator, L1Kernel, Modules, NestedHost, Share,
        StockKernel, build_program, guest_archive,
    },
    progress::Step,
};

/// The guest runs this script, and shows its text on the serial console and, below the kernel messages, on its display.
const SCRIPT: &str = r#"
say() { echo "$1"; echo "$1" > /dev/tty1; }
say
say "  This is $(uname -sr), a stock Debian kernel, in a Fanlight virtual machine."
say "  It has $(nproc) processor and $(($(grep MemTotal /proc/meminfo | tr -dc 0-9) / 1024)) MiB of memory,"
say "  and reached its init $(cut -d' ' -f1 /proc/uptime) seconds after its kernel's first instruction."
say "  Its display is a $(cat /sys/class/graphics/fb0/name) of $(tr , x < /sys/class/graphics/fb0/virtual_size) pixels."
say
echo 0 > /sys/class/graphics/fbcon/cursor_blink
sleep 1
echo "fanlight-demo: drawn"
read -r line
echo "  Now it powers itself off."
echo
"#;
/// The same for `--window`: a page of the guest's console that is worth a picture.
const WINDOW_SCRIPT: &str = include_str!("../../../resources/demo/window.sh");
/// Size of the guest's display for `--window`, in pixels.
const DISPLAY: (u32, u32) = (896, 512);
/// Size of the desktop, and where on it the window shows the display: inside its title and border.
const DESKTOP: (u32, u32) = (960, 608);
const PLACE: (u32, u32) = (32, 62);
/// A plain desktop whose windows have titles.
const SWAY: &str = "output * bg #25465f solid_color
font pango:DejaVu Sans Bold 11
titlebar_padding 12 7
title_align center
client.focused #e8e4dc #e8e4dc #202020 #e8e4dc #e8e4dc
for_window [app_id=\"fanlight\"] floating enable, border normal 3, resize set width 902 height 547, \
move absolute position 29 30";
/// The guest has drawn, and waits. This line is not shown.
const MARK: &str = "fanlight-demo: drawn";
const OPTIONS: &[&str] = &[
    "--memory",
    "512M",
    "--cmdline",
    "console=tty0 console=ttyS0 panic=-1",
];
const PICTURE: &str = "display.png";
const WINDOW_PICTURE: &str = "window.png";
const WINDOW: &str = "--window";

/// The files that the guest starts from.
struct Parts<'a> {
    fanlight: &'a Path,
    kernel: &'a Path,
    initrd: &'a Path,
    /// Directory for the picture.
    pictures: &'a Path,
    /// What shows the display in a window, if one is wanted.
    compositors: Option<DebianPrograms>,
}

fn main() -> ExitCode {
    let window = std::env::args().any(|argument| argument == WINDOW);
    let status = if std::env::var_os(kvm_host::IN_NESTED_HOST).is_some() {
        show_in_nested_host(window)
    } else {
        demo(window)
    };
    match status {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(1)),
        Err(error) => {
            eprintln!("fanlight: the demo failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn demo(window: bool) -> Result<i32> {
    let fanlight = build_program("fanlight", "fanlight")?;
    let cache = Cache::open()?;
    let busybox = Busybox::get(&cache)?;
    let kernel = StockKernel::get(&cache)?;
    let mut initrd = guest_archive(&busybox, None, None)?;
    let mut more = Archive::default();
    let script = if window { WINDOW_SCRIPT } else { SCRIPT };
    more.file("test", format!("#!/bin/sh\n{script}").as_bytes());
    let modules = Modules::find(&kernel.modules)?;
    let drivers = ["virtio_pci", "virtio_gpu", "virtio_input", "virtio_rng"];
    more.modules(&modules, if window { &drivers } else { &drivers[..2] })?;
    initrd.extend(more.finish());
    let this = std::env::current_exe().context("cannot find the path of this program")?;
    let pictures = pictures(&this)?;
    let compositors = window.then(|| compositors(&cache)).transpose()?;
    let status = match kvm_host::kvm() {
        Kvm::Host => {
            eprintln!("fanlight: the guest runs on this machine's /dev/kvm");
            let dir = tempfile::tempdir().context("cannot make a directory")?;
            let path = dir.path().join("initrd");
            fs::write(&path, initrd).context("cannot write the guest's root")?;
            show(&Parts {
                fanlight: &fanlight,
                kernel: &kernel.image,
                initrd: &path,
                pictures: &pictures,
                compositors,
            })?
        }
        Kvm::NestedHost(reason) => {
            eprintln!(
                "fanlight: the guest runs in the nested host, an emulated KVM host: {reason}"
            );
            let emulator = Emulator::get(&cache)?;
            let nested_host = NestedHost::new(emulator, busybox, L1Kernel::Stock(kernel.clone()));
            let share = |tag, path: &Path, readonly| Share {
                tag,
                path: path.into(),
                readonly,
            };
            let shares = [
                share("share", &pictures, false),
                share("cache", cache.root(), true),
            ];
            let job = format!("exec /demo {}", if window { WINDOW } else { "" });
            let programs = [&*this, &*fanlight];
            let mut output = Waiting(Some(Step::begin("starting the nested host")));
            nested_host.run(&job, &programs, &shares, &mut output, |root| {
                root.host_file("demo", &this)?;
                root.host_file("fanlight", &fanlight)?;
                root.host_file("vmlinuz", &kernel.image)?;
                root.file("initrd", &initrd);
                Ok(())
            })?
        }
    };
    let of_window = window.then_some((WINDOW_PICTURE, "window"));
    for (name, what) in [(PICTURE, "guest display")].into_iter().chain(of_window) {
        let picture = pictures.join(name);
        if status == 0 {
            let size =
                fs::metadata(&picture).context(format!("there is no picture of the {what}"))?;
            println!(
                "fanlight: the picture of the {what}, {} bytes: {}",
                size.len(),
                picture.display()
            );
        }
    }
    Ok(status)
}

/// Standard output, and until the first text comes a step that is under way.
struct Waiting(Option<Step>);

impl Write for Waiting {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(step) = self.0.take() {
            step.end("done in");
        }
        io::stdout().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

/// The directory for the pictures, in the target directory. Removes the pictures of an earlier run.
fn pictures(this: &Path) -> Result<PathBuf> {
    let target = this.ancestors().nth(2).unwrap_or(Path::new("."));
    let dir = target.join("demo");
    fs::create_dir_all(&dir).context(format!("cannot make {}", dir.display()))?;
    for picture in [PICTURE, WINDOW_PICTURE] {
        match fs::remove_file(dir.join(picture)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Failure::new("cannot remove the last picture", error));
            }
            _ => {}
        }
    }
    Ok(dir)
}

/// Runs the guest of the files that [`demo`] puts into the nested host.
fn show_in_nested_host(window: bool) -> Result<i32> {
    let cache = Cache::at("/cache");
    show(&Parts {
        fanlight: Path::new("/fanlight"),
        kernel: Path::new("/vmlinuz"),
        initrd: Path::new("/initrd"),
        pictures: Path::new("/share"),
        compositors: window.then(|| compositors(&cache)).transpose()?,
    })
}

/// Runs the guest, passes its console on, and takes the picture when it has drawn. Returns its exit status.
fn show(parts: &Parts) -> Result<i32> {
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let socket = dir.path().join("api");
    let (cpus, (width, height)) = match parts.compositors {
        None => ("1", (1024, 768)),
        Some(_) => ("2", DISPLAY),
    };
    let mut guest = Command::new(parts.fanlight)
        .arg("run")
        .args(OPTIONS)
        .args([
            "--cpus",
            cpus,
            "--gpu",
            &format!("outputs={width}x{height}"),
        ])
        .arg("--kernel")
        .arg(parts.kernel)
        .arg("--initrd")
        .arg(parts.initrd)
        .arg("--api-socket")
        .arg(&socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run fanlight")?;
    let (Some(mut keyboard), Some(console)) = (guest.stdin.take(), guest.stdout.take()) else {
        return Err(Failure("fanlight has no console".into()));
    };
    let mut lines = BufReader::new(console);
    let mut line = Vec::new();
    let mut taken = Ok(());
    while lines
        .read_until(b'\n', &mut line)
        .context("cannot read the guest's console")?
        > 0
    {
        if String::from_utf8_lossy(&line).contains(MARK) {
            taken = take_picture(&socket, &parts.pictures.join(PICTURE))
                .and_then(|()| picture_of_window(parts, &socket));
            // The guest goes on without a picture too.
            keyboard
                .write_all(b"\n")
                .context("cannot type on the guest's console")?;
        } else {
            let mut output = io::stdout();
            let _ = output.write_all(&line).and_then(|()| output.flush());
        }
        line.clear();
    }
    let status = guest.wait().context("cannot wait for fanlight")?;
    taken?;
    Ok(status.code().unwrap_or(1))
}

fn take_picture(socket: &Path, file: &Path) -> Result<()> {
    let mut client = Client::connect(socket).context("cannot reach the guest's VMM")?;
    let wanted = Screenshot {
        file: Some(file.into()),
        ..Screenshot::default()
    };
    client
        .call::<GpuScreenshot>(&wanted)
        .context("gpu.screenshot")
        .map(drop)
}

/// Shows the display in a window, and takes a picture of the desktop once the window shows what the guest does.
///
/// Only Sway draws titles, and only Weston takes pictures: Sway's screen is a window in Weston.
fn picture_of_window(parts: &Parts, socket: &Path) -> Result<()> {
    let Some(programs) = &parts.compositors else {
        return Ok(());
    };
    let weston = Compositor::weston(programs, "pixman", DESKTOP)?;
    let sway = Compositor::sway(programs, SWAY, DESKTOP, Some(&weston))?;
    let viewer = sway.viewer(parts.fanlight, socket)?;
    let shown = parts.pictures.join(PICTURE);
    let start = Instant::now();
    loop {
        thread::sleep(Duration::from_secs(1));
        // The guest draws anew when the size of the window changes its display.
        take_picture(socket, &shown)?;
        let picture = read_png(File::open(&shown).context("cannot open the picture")?)?;
        let wrong = weston.differences(&picture, DISPLAY, PLACE)?;
        let done = wrong == 0 && picture.len() == 3 * (DISPLAY.0 * DISPLAY.1) as usize;
        let late = start.elapsed() > PATIENCE;
        if done || late {
            weston.screenshot(&parts.pictures.join(WINDOW_PICTURE))?;
        }
        if done {
            return Ok(());
        }
        if late {
            let said = viewer.said();
            return Err(Failure(format!(
                "the window never shows the guest's display: {wrong} values are others; the viewer said: {said}"
            )));
        }
    }
}
