//! `cargo demo`: boots a stock Debian kernel, shows its console and takes a picture of its display, on any machine.
//! On a machine without KVM this program runs itself again in the nested host.

use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use fanlight_api::{client::Client, display::Screenshot, methods::GpuScreenshot};
use fanlight_tests::{
    Context, Failure, Result,
    host_side::kvm_host::{self, Kvm},
    nested_host::{
        Archive, Busybox, Cache, Emulator, L1Kernel, Modules, NestedHost, Share, StockKernel,
        build_program, guest_archive,
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
/// The guest has drawn, and waits. This line is not shown.
const MARK: &str = "fanlight-demo: drawn";
const OPTIONS: &[&str] = &[
    "--cpus",
    "1",
    "--memory",
    "512M",
    "--gpu",
    "outputs=1024x768",
    "--cmdline",
    "console=tty0 console=ttyS0 panic=-1",
];
const PICTURE: &str = "display.png";

/// The files that the guest starts from.
struct Parts<'a> {
    fanlight: &'a Path,
    kernel: &'a Path,
    initrd: &'a Path,
    /// Directory for the picture.
    pictures: &'a Path,
}

fn main() -> ExitCode {
    let status = if std::env::var_os(kvm_host::IN_NESTED_HOST).is_some() {
        show(&Parts {
            fanlight: Path::new("/fanlight"),
            kernel: Path::new("/vmlinuz"),
            initrd: Path::new("/initrd"),
            pictures: Path::new("/share"),
        })
    } else {
        demo()
    };
    match status {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(1)),
        Err(error) => {
            eprintln!("fanlight: the demo failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn demo() -> Result<i32> {
    let fanlight = build_program("fanlight", "fanlight")?;
    let cache = Cache::open()?;
    let busybox = Busybox::get(&cache)?;
    let kernel = StockKernel::get(&cache)?;
    let mut initrd = guest_archive(&busybox, None, None)?;
    let mut more = Archive::default();
    more.file("test", format!("#!/bin/sh\n{SCRIPT}").as_bytes());
    let modules = Modules::find(&kernel.modules)?;
    more.modules(&modules, &["virtio_pci", "virtio_gpu"])?;
    initrd.extend(more.finish());
    let this = std::env::current_exe().context("cannot find the path of this program")?;
    let pictures = pictures(&this)?;
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
            })?
        }
        Kvm::NestedHost(reason) => {
            eprintln!(
                "fanlight: the guest runs in the nested host, an emulated KVM host: {reason}"
            );
            let emulator = Emulator::get(&cache)?;
            let nested_host = NestedHost::new(emulator, busybox, L1Kernel::Stock(kernel.clone()));
            let share = Share {
                tag: "share",
                path: pictures.clone(),
                readonly: false,
            };
            let programs = [&*this, &*fanlight];
            let mut output = Waiting(Some(Step::begin("starting the nested host")));
            nested_host.run("exec /demo", &programs, &[share], &mut output, |root| {
                root.host_file("demo", &this)?;
                root.host_file("fanlight", &fanlight)?;
                root.host_file("vmlinuz", &kernel.image)?;
                root.file("initrd", &initrd);
                Ok(())
            })?
        }
    };
    let picture = pictures.join(PICTURE);
    if status == 0 {
        let size = fs::metadata(&picture).context("there is no picture of the guest display")?;
        println!(
            "fanlight: the picture of the guest display, {} bytes: {}",
            size.len(),
            picture.display()
        );
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

/// The directory for the picture, in the target directory. Removes the picture of an earlier run.
fn pictures(this: &Path) -> Result<PathBuf> {
    let target = this.ancestors().nth(2).unwrap_or(Path::new("."));
    let dir = target.join("demo");
    fs::create_dir_all(&dir).context(format!("cannot make {}", dir.display()))?;
    match fs::remove_file(dir.join(PICTURE)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::new("cannot remove the last picture", error))
        }
        _ => Ok(dir),
    }
}

/// Runs the guest, passes its console on, and takes the picture when it has drawn. Returns its exit status.
fn show(parts: &Parts) -> Result<i32> {
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let socket = dir.path().join("api");
    let mut guest = Command::new(parts.fanlight)
        .arg("run")
        .args(OPTIONS)
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
            taken = take_picture(&socket, &parts.pictures.join(PICTURE));
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
