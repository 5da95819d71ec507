//! The display over the API, and `fanlight view` in a real compositor: Weston, without a screen.

use std::{
    fs::{self, File},
    io::BufReader,
    os::fd::OwnedFd,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use fanlight_api::{
    client::Client,
    display::{
        DisplayNews, OutputIndex, PixelsIn, Screenshot, SetOutput, WatchDisplay, WatcherSays,
    },
    methods::{DisplaySubscribe, GpuExportScanout, GpuScreenshot, GpuSetOutput},
    stream::MessageStream,
};
use fanlight_tests::{
    Context, Failure, Result,
    guest::{Assets, Guest, GuestBuilder, ensure, value},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

use crate::Test;

pub const TESTS: &[(&str, Test)] = &[
    ("view::a_screenshot_and_a_shared_frame", screenshot),
    ("view::a_stream_of_changes_and_keys", stream),
    ("view::a_window_in_weston", weston),
];

const MODULES: &[&str] = &["virtio_gpu", "virtio_input"];
const WIDTH: u32 = 640;
const HEIGHT: u32 = 480;
/// Somebody who does not answer for so long hangs. Not a measure of speed.
const PATIENCE: Duration = Duration::from_secs(120);

/// Fills the screen with random bytes, says so, and runs the lines that are typed. These are echoed: marks in
/// them are broken by quotes.
const DRAW: &str = "echo 0 > /sys/class/graphics/fbcon/cursor_blink
    head -c 1228800 /dev/urandom > /tmp/picture; cat /tmp/picture > /dev/fb0
    echo sum: $(md5sum < /tmp/picture); echo drawn
    while read -r line; do eval \"$line\"; done";

fn drawing(assets: &Assets) -> Result<(Guest, Client, PathBuf)> {
    let guest: GuestBuilder = assets
        .guest(DRAW)
        .modules(MODULES)?
        .option("--gpu", format!("outputs={WIDTH}x{HEIGHT}"));
    let socket = guest.path("api");
    let mut guest = guest.option("--api-socket", &socket).start()?;
    guest.wait_for("drawn")?;
    let client = Client::connect(&socket).context("cannot connect")?;
    Ok((guest, client, socket))
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

fn take_picture(client: &mut Client) -> Result<Vec<u8>> {
    let (taken, fds) = client
        .call_with::<GpuScreenshot>(&Screenshot::default(), &[])
        .context("gpu.screenshot")?;
    ensure(
        (taken.width, taken.height) == (WIDTH, HEIGHT),
        format!("{taken:?}"),
    )?;
    read_png(File::from(one(fds)?))
}

pub fn one(fds: Vec<OwnedFd>) -> Result<OwnedFd> {
    fds.into_iter()
        .next()
        .ok_or(Failure("no descriptor".into()))
}

/// Has the guest draw and tell the sum of what it has, and of red, green and blue alone.
fn screenshot(assets: &Assets) -> Result<()> {
    let (mut guest, mut client, _) = drawing(assets)?;
    let picture = take_picture(&mut client)?;
    let (exported, fds) = client
        .call_with::<GpuExportScanout>(&OutputIndex::default(), &[])
        .context("gpu.export_scanout")?;
    ensure(
        (exported.width, exported.height, exported.modifier) == (WIDTH, HEIGHT, 0),
        format!("{exported:?}"),
    )?;
    let pixels = Pixels::map(&one(fds)?, &exported)?;
    ensure(pixels.rgb() == picture, "the picture is not the dma-buf's")?;
    if exported.location == PixelsIn::GuestRam {
        // Nothing is called: what the guest writes is there.
        guest.send("head -c 1228800 /dev/zero | tr '\\0' '\\125' > /dev/fb0; echo pain''ted\n")?;
        guest.wait_for("painted")?;
        let painted = |rgb: Vec<u8>| rgb.iter().all(|&byte| byte == 0x55);
        ensure(
            painted(pixels.rgb()),
            "a write does not show in the dma-buf",
        )?;
    }
    let outputs = client
        .call::<GpuSetOutput>(&SetOutput {
            output: 1,
            mode: Some("800x600".into()),
        })
        .context("gpu.set_output")?;
    ensure(outputs.outputs[1].connected, format!("{outputs:?}"))?;
    guest.send("until grep -qx connected /sys/class/drm/card0-Virtual-2/status; do sleep 0.1; done; poweroff -f\n")?;
    guest.expect_exit(0)
}

/// A mapping of an exported picture.
struct Pixels {
    start: *mut core::ffi::c_void,
    len: usize,
    offset: usize,
    stride: usize,
}

impl Pixels {
    fn map(fd: &OwnedFd, exported: &fanlight_api::display::ExportedPicture) -> Result<Self> {
        let (offset, stride) = (exported.offset as usize, exported.stride as usize);
        let len = offset + stride * exported.height as usize;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ,
                MapFlags::SHARED,
                fd,
                0,
            )
        }
        .context("cannot map the dma-buf")?;
        Ok(Self {
            start,
            len,
            offset,
            stride,
        })
    }

    /// Red, green and blue, of XRGB8888.
    fn rgb(&self) -> Vec<u8> {
        let mut rgb = Vec::new();
        for y in 0..HEIGHT as usize {
            for x in 0..WIDTH as usize {
                let at = self.offset + y * self.stride + x * 4;
                // SAFETY: within the mapping, as its size was computed; the guest writes meanwhile.
                let pixel = unsafe { self.start.byte_add(at).cast::<[u8; 4]>().read_volatile() };
                rgb.extend([pixel[2], pixel[1], pixel[0]]);
            }
        }
        rgb
    }
}

impl Drop for Pixels {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's.
        let _ = unsafe { munmap(self.start, self.len) };
    }
}

fn stream(assets: &Assets) -> Result<()> {
    let (mut guest, mut client, _) = drawing(assets)?;
    let watch = WatchDisplay {
        pace: true,
        drive: true,
    };
    let (stream, fds) = client
        .call_with::<DisplaySubscribe>(&watch, &[])
        .context("display.subscribe")?;
    ensure(stream.drives, "nobody else drives")?;
    let (second, _second) = client
        .call_with::<DisplaySubscribe>(&watch, &[])
        .context("a second display.subscribe")?;
    ensure(!second.drives, "two drive")?;
    let mut stream = MessageStream::new(UnixStream::from(one(fds)?)).context("a stream")?;
    let shown = wait_for(&mut stream, |news, fds| match news {
        DisplayNews::Scanout {
            output: 0,
            picture: Some(picture),
            ..
        } => Some((picture.clone(), fds)),
        _ => None,
    })?;
    let pixels = Pixels::map(&one(shown.1)?, &shown.0)?;
    guest.send("head -c 1228800 /dev/zero | tr '\\0' '\\052' > /dev/fb0; echo pain''ted\n")?;
    guest.wait_for("painted")?;
    let serial = wait_for(&mut stream, |news, _| match news {
        DisplayNews::Damage {
            output: 0, serial, ..
        } if pixels.rgb().iter().all(|&byte| byte == 0x2a) => Some(*serial),
        _ => None,
    })?;
    let say = |stream: &mut MessageStream, says| stream.send(&says, vec![]).context("cannot say");
    say(&mut stream, WatcherSays::Release { serial })?;

    guest.send("echo liste''ning; for e in /dev/input/event*; do grep -q keyboard /sys/class/input/${e##*/}/device/name && dd if=$e bs=24 count=1 2>/dev/null | od -An -tu2 -j 16 -N 8 | sed 's/^/key: /'; done\n")?;
    guest.wait_for("listening")?;
    thread::sleep(Duration::from_secs(1));
    // KEY_K.
    for pressed in [true, false] {
        say(&mut stream, WatcherSays::Key { code: 37, pressed })?;
    }
    guest.wait_for("key:")?;
    thread::sleep(Duration::from_millis(500));
    let said = guest.transcript();
    let key: Vec<_> = value(&said, "key:")?.split_whitespace().collect();
    ensure(key == ["1", "37", "1", "0"], &said)?;

    let (width, height) = (800, 600);
    let resize = WatcherSays::Resize {
        output: 0,
        width,
        height,
    };
    say(&mut stream, resize)?;
    wait_for(&mut stream, |news, _| match news {
        DisplayNews::Outputs(outputs) => outputs
            .outputs
            .first()
            .filter(|output| (output.width, output.height) == (width, height))
            .map(drop),
        _ => None,
    })?;
    // A watcher that goes costs nobody anything.
    drop(stream);
    guest.send("cd /sys/class/drm/card0-Virtual-1; while echo detect > status; do head -n 1 modes | grep 800x600 && break; sleep 0.1; done; poweroff -f\n")?;
    guest.expect_exit(0)
}

/// The first news that `wanted` takes.
fn wait_for<T>(
    stream: &mut MessageStream,
    wanted: impl Fn(&DisplayNews, Vec<OwnedFd>) -> Option<T>,
) -> Result<T> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        let mut fds = [PollFd::new(&*stream, PollFlags::IN)];
        let second = Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&second)).context("cannot wait")?;
        let mut found = None;
        for (news, fds) in stream.receive::<DisplayNews>().context("the stream")? {
            if let DisplayNews::Damage { serial, .. } = news {
                let release = WatcherSays::Release { serial };
                stream.send(&release, vec![]).context("cannot release")?;
            }
            found = found.or(wanted(&news, fds));
        }
        if let Some(found) = found {
            return Ok(found);
        }
    }
    Err(Failure("the display never said it".into()))
}

/// Weston in the root that its packages make.
struct Weston {
    root: PathBuf,
    runtime: tempfile::TempDir,
    process: Child,
}

const SOCKET: &str = "wl-test";

impl Weston {
    fn start(assets: &Assets) -> Result<Self> {
        let root = assets.weston.0.clone();
        for dir in ["dev", "proc", "sys", "tmp"] {
            rustix::mount::mount_bind(format!("/{dir}"), root.join(dir))
                .context(format!("cannot show /{dir} to Weston"))?;
        }
        let runtime = tempfile::tempdir_in("/tmp").context("cannot make a directory")?;
        let process = Self::command(&root, runtime.path(), "weston")
            .args(["--backend=headless", "--renderer=pixman", "--shell=kiosk"])
            .arg("--debug")
            .arg(format!("--socket={SOCKET}"))
            .args([format!("--width={WIDTH}"), format!("--height={HEIGHT}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start Weston")?;
        let weston = Self {
            root,
            runtime,
            process,
        };
        let start = Instant::now();
        while !weston.runtime.path().join(SOCKET).exists() {
            ensure(start.elapsed() < PATIENCE, "Weston never listens")?;
            thread::sleep(Duration::from_millis(100));
        }
        Ok(weston)
    }

    fn command(root: &Path, runtime: &Path, program: &str) -> Command {
        let mut command = Command::new("chroot");
        command
            .arg(root)
            .arg(format!("/usr/bin/{program}"))
            .env("XDG_RUNTIME_DIR", runtime)
            .env("XDG_PICTURES_DIR", runtime)
            .env("WAYLAND_DISPLAY", SOCKET)
            .env("LD_LIBRARY_PATH", "/usr/lib/x86_64-linux-gnu");
        command
    }

    fn screenshot(&self) -> Result<Vec<u8>> {
        let status = Self::command(&self.root, self.runtime.path(), "weston-screenshooter")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .context("cannot run weston-screenshooter")?;
        ensure(status.success(), format!("weston-screenshooter: {status}"))?;
        let files = fs::read_dir(self.runtime.path()).context("cannot look for the picture")?;
        let path = files
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|e| e == "png"))
            .ok_or(Failure("weston-screenshooter made no picture".into()))?;
        let picture = read_png(File::open(&path).context("cannot open the picture")?)?;
        fs::remove_file(&path).context("cannot remove the picture")?;
        Ok(picture)
    }

    fn viewer(&self, assets: &Assets, socket: &Path) -> Result<Child> {
        Command::new(&assets.fanlight)
            .arg("view")
            .arg(socket)
            .env("XDG_RUNTIME_DIR", self.runtime.path())
            .env("WAYLAND_DISPLAY", SOCKET)
            .spawn()
            .context("cannot start fanlight view")
    }

    /// Waits until the screen shows a picture.
    fn wait_for(&self, picture: &[u8]) -> Result<()> {
        let start = Instant::now();
        while self.screenshot()? != picture {
            ensure(start.elapsed() < PATIENCE, "the window never shows it")?;
            thread::sleep(Duration::from_millis(500));
        }
        Ok(())
    }
}

impl Drop for Weston {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        for dir in ["dev", "proc", "sys", "tmp"] {
            let flags = rustix::mount::UnmountFlags::DETACH;
            let _ = rustix::mount::unmount(self.root.join(dir), flags);
        }
    }
}

fn weston(assets: &Assets) -> Result<()> {
    let (mut guest, mut client, socket) = drawing(assets)?;
    let weston = Weston::start(assets)?;
    let mut viewer = weston.viewer(assets, &socket)?;
    weston.wait_for(&take_picture(&mut client)?)?;
    guest.send(
        "cat /tmp/picture | tr '\\000-\\377' '\\001-\\377\\000' > /dev/fb0; echo pain''ted\n",
    )?;
    guest.wait_for("painted")?;
    let second = take_picture(&mut client)?;
    weston.wait_for(&second)?;
    // A viewer that stops or dies takes nothing with it.
    viewer.kill().context("cannot kill the viewer")?;
    viewer.wait().context("cannot wait for the viewer")?;
    guest.send("cat /tmp/picture > /dev/fb0; echo a''gain\n")?;
    guest.wait_for("again")?;
    let mut viewer = weston.viewer(assets, &socket)?;
    weston.wait_for(&take_picture(&mut client)?)?;
    guest.send("poweroff -f\n")?;
    guest.expect_exit(0)?;
    let status = viewer.wait().context("cannot wait for the viewer")?;
    ensure(status.success(), format!("the viewer ended with {status}"))
}
