//! Real Wayland compositors without a screen, in the root that their packages make, and viewers in them.

use std::{
    fs::{self, File},
    io::BufReader,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use fanlight_api::{client::Client, display::Screenshot, methods::GpuScreenshot};
use fanlight_tests::{Context, Failure, Result, ensure, host_side::guest::Assets};

use super::view::{HEIGHT, PATIENCE, WIDTH, one};

/// What the host has that a compositor needs.
const SHOWN: [&str; 4] = ["dev", "proc", "sys", "tmp"];

/// A compositor with one output, as large as the guests'.
pub struct Compositor {
    root: PathBuf,
    runtime: tempfile::TempDir,
    process: Child,
    socket: String,
}

impl Compositor {
    /// Weston, whose only window fills the output. `renderer` is `pixman`, which copies, or `gl`.
    pub fn weston(assets: &Assets, renderer: &str) -> Result<Self> {
        Self::start(assets, "weston", |command, _| {
            command
                .args(["--backend=headless", "--shell=kiosk", "--debug"])
                .arg(format!("--renderer={renderer}"))
                .arg("--socket=wl-test")
                .args([format!("--width={WIDTH}"), format!("--height={HEIGHT}")]);
            Ok(())
        })
    }

    /// Sway, with `config` besides what it needs to be as large. Its windows are tiles; its pixels are copies.
    pub fn sway(assets: &Assets, config: &str) -> Result<Self> {
        Self::start(assets, "sway", |command, runtime| {
            let text = format!(
                "output HEADLESS-1 resolution {WIDTH}x{HEIGHT}\ndefault_border none\n{config}\n"
            );
            let path = runtime.join("config");
            fs::write(&path, text).context("cannot write Sway's configuration")?;
            command
                .arg("-c")
                .arg(path)
                .env("WLR_BACKENDS", "headless")
                .env("WLR_RENDERER", "pixman")
                .env("WLR_LIBINPUT_NO_DEVICES", "1");
            Ok(())
        })
    }

    fn start(
        assets: &Assets,
        program: &str,
        configure: impl FnOnce(&mut Command, &Path) -> Result<()>,
    ) -> Result<Self> {
        let root = assets.compositors.0.clone();
        for dir in SHOWN {
            rustix::mount::mount_bind(format!("/{dir}"), root.join(dir))
                .context(format!("cannot show /{dir} to {program}"))?;
        }
        let runtime = tempfile::tempdir_in("/tmp").context("cannot make a directory")?;
        let log = File::create(runtime.path().join("log")).context("cannot make a log")?;
        let mut command = Self::command_in(&root, runtime.path(), program);
        configure(&mut command, runtime.path())?;
        let process = command
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context(format!("cannot start {program}"))?;
        let mut compositor = Self {
            root,
            runtime,
            process,
            socket: String::new(),
        };
        let start = Instant::now();
        while compositor.socket.is_empty() {
            if start.elapsed() > PATIENCE {
                let log = fs::read_to_string(compositor.path("log")).unwrap_or_default();
                return Err(Failure(format!("{program} never listens:\n{log}")));
            }
            thread::sleep(Duration::from_millis(100));
            compositor.socket = compositor.find("w", "").unwrap_or_default();
        }
        Ok(compositor)
    }

    /// A path in the compositor's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.runtime.path().join(name)
    }

    /// The file there whose name starts and ends so, and which is no lock.
    fn find(&self, prefix: &str, suffix: &str) -> Option<String> {
        let files = fs::read_dir(self.runtime.path()).ok()?;
        files
            .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
            .find(|name| {
                name.starts_with(prefix) && name.ends_with(suffix) && !name.ends_with(".lock")
            })
    }

    fn command_in(root: &Path, runtime: &Path, program: &str) -> Command {
        let mut command = Command::new("chroot");
        command
            .arg(root)
            .arg(format!("/usr/bin/{program}"))
            .env("XDG_RUNTIME_DIR", runtime)
            .env("XDG_PICTURES_DIR", runtime)
            .env("LD_LIBRARY_PATH", "/usr/lib/x86_64-linux-gnu");
        command
    }

    /// The compositor's process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The compositor's socket.
    pub fn socket(&self) -> PathBuf {
        self.path(&self.socket)
    }

    /// What Sway says to a message of swaymsg's, which gives up after three seconds: an emulated host may need
    /// more.
    pub fn swaymsg(&self, arguments: &[&str]) -> Result<String> {
        let start = Instant::now();
        loop {
            let socket = self.find("sway-ipc", ".sock").unwrap_or_default();
            let output = Self::command_in(&self.root, self.runtime.path(), "swaymsg")
                .env("SWAYSOCK", self.path(&socket))
                .args(arguments)
                .output()
                .context("cannot run swaymsg")?;
            if output.status.success() {
                return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
            }
            let said = String::from_utf8_lossy(&output.stderr);
            let log = || fs::read_to_string(self.path("log")).unwrap_or_default();
            let failed = || format!("swaymsg {arguments:?}: {said}; Sway said:\n{}", log());
            if start.elapsed() > PATIENCE {
                return Err(Failure(failed()));
            }
            thread::sleep(Duration::from_millis(500));
        }
    }

    /// What Weston shows: red, green and blue of each pixel.
    fn screenshot(&self) -> Result<Vec<u8>> {
        let status = Self::command_in(&self.root, self.runtime.path(), "weston-screenshooter")
            .env("WAYLAND_DISPLAY", &self.socket)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .context("cannot run weston-screenshooter")?;
        ensure(status.success(), format!("weston-screenshooter: {status}"))?;
        let name = self
            .find("", ".png")
            .ok_or(Failure("weston-screenshooter made no picture".into()))?;
        let path = self.path(&name);
        let picture = read_png(File::open(&path).context("cannot open the picture")?)?;
        fs::remove_file(&path).context("cannot remove the picture")?;
        Ok(picture)
    }

    /// Waits until Weston's screen shows a picture.
    pub fn wait_for(&self, picture: &[u8]) -> Result<()> {
        let start = Instant::now();
        loop {
            let shown = self.screenshot()?;
            if shown == picture {
                return Ok(());
            }
            if start.elapsed() > PATIENCE {
                let wrong = shown.iter().zip(picture).filter(|(a, b)| a != b).count();
                return Err(Failure(format!(
                    "the window never shows it: {wrong} of {} values are others ({} shown)",
                    picture.len(),
                    shown.len()
                )));
            }
            thread::sleep(Duration::from_millis(500));
        }
    }

    /// `fanlight view` in this compositor.
    pub fn viewer(&self, assets: &Assets, api: &Path) -> Result<Viewer> {
        Viewer::start(assets, api, self.runtime.path(), &self.socket)
    }
}

impl Drop for Compositor {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        for dir in SHOWN {
            let flags = rustix::mount::UnmountFlags::DETACH;
            let _ = rustix::mount::unmount(self.root.join(dir), flags);
        }
    }
}

/// `fanlight view`. Dropping kills it.
pub struct Viewer {
    /// The process.
    pub process: Child,
    log: PathBuf,
}

impl Viewer {
    /// Starts it in the compositor that listens at `socket` in `runtime`.
    pub fn start(assets: &Assets, api: &Path, runtime: &Path, socket: &str) -> Result<Self> {
        let log = runtime.join("viewer.log");
        let errors = File::create(&log).context("cannot make a log")?;
        let process = Command::new(&assets.fanlight)
            .arg("view")
            .arg(api)
            .env("XDG_RUNTIME_DIR", runtime)
            .env("WAYLAND_DISPLAY", socket)
            .stderr(errors)
            .spawn()
            .context("cannot start fanlight view")?;
        Ok(Self { process, log })
    }

    /// What it said on standard error.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Red, green and blue of each pixel.
pub fn read_png(file: File) -> Result<Vec<u8>> {
    let mut reader = png::Decoder::new(BufReader::new(file))
        .read_info()
        .context("not a PNG file")?;
    let size = reader
        .output_buffer_size()
        .ok_or(Failure("too large".into()))?;
    let mut pixels = vec![0; size];
    let info = reader.next_frame(&mut pixels).context("a bad PNG file")?;
    let samples = info.color_type.samples();
    Ok(pixels
        .chunks_exact(samples)
        .flat_map(|pixel| pixel[..3].to_vec())
        .collect())
}

/// What the guest shows, by `gpu.screenshot`.
pub fn take_picture(client: &mut Client) -> Result<Vec<u8>> {
    let (taken, fds) = client
        .call_with::<GpuScreenshot>(&Screenshot::default(), &[])
        .context("gpu.screenshot")?;
    ensure(
        (taken.width, taken.height) == (WIDTH, HEIGHT),
        format!("{taken:?}"),
    )?;
    read_png(File::from(one(fds)?))
}
