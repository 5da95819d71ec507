//! Real Wayland compositors without a screen, in a root of their Debian packages, and viewers in them.

use std::{
    fs::{self, File},
    io::BufReader,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{
    Context, Failure, Result, ensure,
    nested_host::{Cache, DebianPrograms},
};

/// A program that is silent for this long hangs; speed does not matter.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Host directories that a compositor needs.
const SHOWN: [&str; 4] = ["dev", "proc", "sys", "tmp"];

/// Weston and Sway, from the cache or the archive.
pub fn compositors(cache: &Cache) -> Result<DebianPrograms> {
    DebianPrograms::get(cache, "compositors-1", &["weston", "sway"])
}

/// A compositor with one output.
pub struct Compositor {
    /// Width and height of the output in pixels.
    size: (u32, u32),
    root: PathBuf,
    runtime: tempfile::TempDir,
    process: Child,
    socket: String,
}

impl Compositor {
    /// Weston, whose only window fills the output. `renderer` is `pixman`, which copies, or `gl`.
    pub fn weston(programs: &DebianPrograms, renderer: &str, size: (u32, u32)) -> Result<Self> {
        Self::start(programs, "weston", size, |command, _| {
            command
                .args(["--backend=headless", "--shell=kiosk", "--debug"])
                .arg(format!("--renderer={renderer}"))
                .arg("--socket=wl-test")
                .args([
                    format!("--width={}", size.0),
                    format!("--height={}", size.1),
                ]);
            Ok(())
        })
    }

    /// Sway with an output of this size, and with `config` added. It tiles windows, and its renderer copies pixels. The
    /// output is a window of `parent`, if given.
    pub fn sway(
        programs: &DebianPrograms,
        config: &str,
        size: (u32, u32),
        parent: Option<&Self>,
    ) -> Result<Self> {
        Self::start(programs, "sway", size, |command, runtime| {
            let text = format!(
                "output * resolution {}x{}\nxwayland disable\ndefault_border none\n{config}\n",
                size.0, size.1
            );
            let path = runtime.join("config");
            fs::write(&path, text).context("cannot write Sway's configuration")?;
            command
                .arg("-c")
                .arg(path)
                .env("WLR_RENDERER", "pixman")
                .env("WLR_LIBINPUT_NO_DEVICES", "1");
            match parent {
                None => command.env("WLR_BACKENDS", "headless"),
                Some(parent) => command
                    .env("WLR_BACKENDS", "wayland")
                    .env("WAYLAND_DISPLAY", parent.socket()),
            };
            Ok(())
        })
    }

    fn start(
        programs: &DebianPrograms,
        program: &str,
        size: (u32, u32),
        configure: impl FnOnce(&mut Command, &Path) -> Result<()>,
    ) -> Result<Self> {
        let root = programs.0.clone();
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
            size,
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

    /// A path in the compositor's runtime directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.runtime.path().join(name)
    }

    /// The file there with this prefix and suffix that is no lock.
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

    /// Sway's reply to a message from swaymsg. That program gives up after three seconds, and an emulated host may need
    /// more, so it is run again.
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

    /// Writes Weston's screen to a PNG file.
    pub fn screenshot(&self, to: &Path) -> Result<()> {
        let status = Self::command_in(&self.root, self.runtime.path(), "weston-screenshooter")
            .env("WAYLAND_DISPLAY", &self.socket)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .context("cannot run weston-screenshooter")?;
        ensure(status.success(), format!("weston-screenshooter: {status}"))?;
        let name = self
            .find("wayland-screenshot", ".png")
            .ok_or(Failure("weston-screenshooter made no picture".into()))?;
        let path = self.path(&name);
        fs::copy(&path, to).context("cannot copy the picture")?;
        fs::remove_file(&path).context("cannot remove the picture")
    }

    /// Compares Weston's screen, from the pixel `at` on, with a picture of this size. Returns how many values (red,
    /// green or blue of a pixel) differ.
    pub fn differences(&self, picture: &[u8], size: (u32, u32), at: (u32, u32)) -> Result<usize> {
        let path = self.path("shown.png");
        self.screenshot(&path)?;
        let shown = read_png(File::open(&path).context("cannot open the picture")?)?;
        let line_of = |pixels: &[u8], width: u32, (x, y): (u32, u32)| {
            let start = 3 * (y as usize * width as usize + x as usize);
            let line = pixels.get(start..start + 3 * size.0 as usize);
            line.map(<[u8]>::to_vec).unwrap_or_default()
        };
        Ok((0..size.1)
            .map(|y| {
                let wanted = line_of(picture, size.0, (0, y));
                let line = line_of(&shown, self.size.0, (at.0, at.1 + y));
                let different = wanted.iter().zip(&line).filter(|(a, b)| a != b).count();
                different + wanted.len().abs_diff(line.len())
            })
            .sum())
    }

    /// Waits until a picture fills Weston's screen.
    pub fn wait_for(&self, picture: &[u8]) -> Result<()> {
        let start = Instant::now();
        loop {
            let wrong = self.differences(picture, self.size, (0, 0))?;
            if wrong == 0 {
                return Ok(());
            }
            if start.elapsed() > PATIENCE {
                return Err(Failure(format!(
                    "the window never shows the picture: {wrong} of {} values differ",
                    picture.len()
                )));
            }
            thread::sleep(Duration::from_millis(500));
        }
    }

    /// `fanlight view` in this compositor.
    pub fn viewer(&self, fanlight: &Path, api: &Path) -> Result<Viewer> {
        Viewer::start(fanlight, api, self.runtime.path(), &self.socket)
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

/// `fanlight view`; killed when dropped.
pub struct Viewer {
    /// The viewer's process.
    pub process: Child,
    log: PathBuf,
}

impl Viewer {
    /// Starts a viewer in the compositor that listens at `socket` in `runtime`.
    pub fn start(fanlight: &Path, api: &Path, runtime: &Path, socket: &str) -> Result<Self> {
        let log = runtime.join("viewer.log");
        let errors = File::create(&log).context("cannot make a log")?;
        let process = Command::new(fanlight)
            .arg("view")
            .arg(api)
            .env("XDG_RUNTIME_DIR", runtime)
            .env("WAYLAND_DISPLAY", socket)
            .stderr(errors)
            .spawn()
            .context("cannot start fanlight view")?;
        Ok(Self { process, log })
    }

    /// The viewer's standard error.
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
    let info = reader
        .next_frame(&mut pixels)
        .context("the PNG file is damaged")?;
    let samples = info.color_type.samples();
    Ok(pixels
        .chunks_exact(samples)
        .flat_map(|pixel| pixel[..3].to_vec())
        .collect())
}
