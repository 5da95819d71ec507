//! The display over the API: pictures, dma-bufs, and update streams.

use std::{
    os::fd::OwnedFd,
    os::unix::net::UnixStream,
    path::PathBuf,
    time::{Duration, Instant},
};

use fanlight_api::{
    client::Client,
    display::{
        DisplayUpdate, GpuIndex, OutputIndex, PixelLocation, SetOutput, SubscribeDisplay,
        ViewerMessage,
    },
    methods::{DisplaySubscribe, GpuExportScanout, GpuOutputs, GpuSetOutput},
    stream::MessageStream,
};
use fanlight_tests::{
    Context, Failure, Result, ensure,
    host_side::{
        display::copied,
        guest::{Assets, Guest, GuestBuilder},
        test_case::TestCase,
    },
    value,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

use super::compositor::take_picture;

pub const TESTS: &[TestCase] = &[
    TestCase::new("view::a_screenshot_and_a_shared_frame", screenshot),
    TestCase::new("view::a_stream_of_changes_and_keys", stream),
];

const MODULES: &[&str] = &["virtio_gpu", "virtio_input"];
/// Width of the guests' displays in pixels.
pub const WIDTH: u32 = 640;
/// Height of the guests' displays in lines.
pub const HEIGHT: u32 = 480;
/// A peer that is silent for this long hangs; speed does not matter.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Fills the screen with random bytes, reports that, and runs the lines that are typed. The terminal echoes them, so
/// marks in them are split by quotes.
const DRAW: &str = "echo 0 > /sys/class/graphics/fbcon/cursor_blink
    head -c 1228800 /dev/urandom > /tmp/picture; cat /tmp/picture > /dev/fb0
    echo sum: $(md5sum < /tmp/picture); echo drawn
    while read -r line; do eval \"$line\"; done";

pub fn drawing(assets: &Assets) -> Result<(Guest, Client, PathBuf)> {
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

/// The only descriptor of a reply.
pub fn one(fds: Vec<OwnedFd>) -> Result<OwnedFd> {
    fds.into_iter()
        .next()
        .ok_or(Failure("no descriptor".into()))
}

/// Has the guest draw random pixels, and compares checksums of all bytes and of red, green and blue alone.
fn screenshot(assets: &Assets) -> Result<()> {
    let (mut guest, mut client, _) = drawing(assets)?;
    ensure(copied(&mut client)? == 0, "a frame was copied for nobody")?;
    let picture = take_picture(&mut client)?;
    let one_picture = u64::from(WIDTH * HEIGHT * 4);
    let read = copied(&mut client)?;
    ensure(
        read == one_picture,
        format!("{read} bytes were copied for a picture, not {one_picture}"),
    )?;
    let (exported, fds) = client
        .call_with::<GpuExportScanout>(&OutputIndex::default(), &[])
        .context("gpu.export_scanout")?;
    ensure(
        (exported.width, exported.height, exported.modifier) == (WIDTH, HEIGHT, 0),
        format!("{exported:?}"),
    )?;
    let pixels = Pixels::map(&one(fds)?, &exported)?;
    ensure(pixels.rgb() == picture, "the picture is not the dma-buf's")?;
    ensure(
        exported.location == PixelLocation::GuestRam,
        format!("{exported:?}"),
    )?;
    // No call is made: what the guest writes is there.
    guest.send("head -c 1228800 /dev/zero | tr '\\0' '\\125' > /dev/fb0; echo pain''ted\n")?;
    guest.wait_for("painted")?;
    let painted = |rgb: Vec<u8>| rgb.iter().all(|&byte| byte == 0x55);
    ensure(
        painted(pixels.rgb()),
        "a write does not show in the dma-buf",
    )?;
    ensure(copied(&mut client)? == read, "the export copied")?;
    let outputs = client
        .call::<GpuSetOutput>(&SetOutput {
            gpu: 0,
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
    fn map(fd: &OwnedFd, exported: &fanlight_api::display::ExportedFrame) -> Result<Self> {
        let (offset, stride) = (exported.offset as usize, exported.stride as usize);
        let len = offset + stride * exported.height as usize;
        // SAFETY: a new mapping at an address that the kernel chooses.
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

    /// Red, green and blue of each XRGB8888 pixel.
    fn rgb(&self) -> Vec<u8> {
        let mut rgb = Vec::new();
        for y in 0..HEIGHT as usize {
            for x in 0..WIDTH as usize {
                let at = self.offset + y * self.stride + x * 4;
                // SAFETY: within the mapping, by its computed size; the access is volatile since the guest may write.
                let pixel = unsafe { self.start.byte_add(at).cast::<[u8; 4]>().read_volatile() };
                rgb.extend([pixel[2], pixel[1], pixel[0]]);
            }
        }
        rgb
    }
}

impl Drop for Pixels {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping.
        let _ = unsafe { munmap(self.start, self.len) };
    }
}

fn stream(assets: &Assets) -> Result<()> {
    let (mut guest, mut client, _) = drawing(assets)?;
    let (looks, _fds) = client
        .call_with::<DisplaySubscribe>(&SubscribeDisplay::default(), &[])
        .context("display.subscribe")?;
    ensure(!looks.drives, "a viewer drives that did not ask for it")?;
    let watch = SubscribeDisplay {
        pace: true,
        drive: true,
        ..SubscribeDisplay::default()
    };
    let (stream, fds) = client
        .call_with::<DisplaySubscribe>(&watch, &[])
        .context("display.subscribe")?;
    ensure(stream.drives, "the only viewer does not drive")?;
    let (second, second_fds) = client
        .call_with::<DisplaySubscribe>(&watch, &[])
        .context("a second display.subscribe")?;
    ensure(!second.drives, "two drive")?;
    let mut second = MessageStream::new(UnixStream::from(one(second_fds)?)).context("a stream")?;
    let mut stream = MessageStream::new(UnixStream::from(one(fds)?)).context("a stream")?;
    let shown = wait_for(&mut stream, |news, fds| match news {
        DisplayUpdate::Scanout {
            output: 0,
            frame: Some(picture),
            ..
        } => Some((picture.clone(), fds)),
        _ => None,
    })?;
    let pixels = Pixels::map(&one(shown.1)?, &shown.0)?;
    guest.send("head -c 1228800 /dev/zero | tr '\\0' '\\052' > /dev/fb0; echo pain''ted\n")?;
    guest.wait_for("painted")?;
    let serial = wait_for(&mut stream, |news, _| match news {
        DisplayUpdate::Damage {
            output: 0, serial, ..
        } if pixels.rgb().iter().all(|&byte| byte == 0x2a) => Some(*serial),
        _ => None,
    })?;
    let say = |stream: &mut MessageStream, says| stream.send(&says, vec![]).context("cannot say");
    say(&mut stream, ViewerMessage::Release { serial })?;
    ensure(copied(&mut client)? == 0, "a watched frame was copied")?;

    // The input device queues events only for open files.
    guest.send("for e in /dev/input/event*; do grep -q keyboard /sys/class/input/${e##*/}/device/name || continue; exec 3< $e; echo liste''ning; dd bs=24 count=1 <&3 2>/dev/null | od -An -tu2 -j 16 -N 8 | sed 's/^/key: /'; echo hea''rd; done\n")?;
    guest.wait_for("listening")?;
    // The guest hears the key of the stream that drives, though the other stream's key was taken first.
    does_not_drive(&mut second)?;
    let outputs = client.call::<GpuOutputs>(&GpuIndex::default());
    let outputs = outputs.context("gpu.outputs")?.outputs;
    ensure(
        (outputs[0].width, outputs[0].height) == (WIDTH, HEIGHT),
        format!("a viewer that does not drive resized one of {outputs:?}"),
    )?;
    // KEY_K.
    for pressed in [true, false] {
        say(&mut stream, ViewerMessage::Key { code: 37, pressed })?;
    }
    guest.wait_for("heard")?;
    let said = guest.transcript();
    let key: Vec<_> = value(&said, "key:")?.split_whitespace().collect();
    ensure(key == ["1", "37", "1", "0"], &said)?;

    let (width, height) = (800, 600);
    let resize = ViewerMessage::Resize {
        output: 0,
        width,
        height,
    };
    say(&mut stream, resize)?;
    wait_for(&mut stream, |news, _| match news {
        DisplayUpdate::Outputs(outputs) => outputs
            .outputs
            .first()
            .filter(|output| (output.width, output.height) == (width, height))
            .map(drop),
        _ => None,
    })?;
    // A subscriber that disconnects disturbs neither the guest nor others.
    drop(stream);
    guest.send("cd /sys/class/drm/card0-Virtual-1; while echo detect > status; do head -n 1 modes | grep 800x600 && break; sleep 0.1; done; poweroff -f\n")?;
    guest.expect_exit(0)
}

/// Sends a size and a key on a stream that does not drive. The display has taken both when this returns.
fn does_not_drive(stream: &mut MessageStream) -> Result<()> {
    let scanout = |news: &DisplayUpdate, _| {
        matches!(news, DisplayUpdate::Scanout { output: 0, .. }).then_some(())
    };
    wait_for(stream, scanout)?;
    let resize = ViewerMessage::Resize {
        output: 0,
        width: 320,
        height: 240,
    };
    // KEY_X.
    let (code, pressed) = (45, true);
    let key = ViewerMessage::Key { code, pressed };
    // Messages are taken in order, and the last is answered.
    for says in [resize, key, ViewerMessage::CopyDeviceMemory] {
        stream.send(&says, vec![]).context("cannot say")?;
    }
    wait_for(stream, scanout)
}

/// The first update that `wanted` accepts.
pub fn wait_for<T>(
    stream: &mut MessageStream,
    wanted: impl Fn(&DisplayUpdate, Vec<OwnedFd>) -> Option<T>,
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
        for (news, fds) in stream.receive::<DisplayUpdate>().context("the stream")? {
            if let DisplayUpdate::Damage { serial, .. } = news {
                let release = ViewerMessage::Release { serial };
                stream.send(&release, vec![]).context("cannot release")?;
            }
            found = found.or(wanted(&news, fds));
        }
        if let Some(found) = found {
            return Ok(found);
        }
    }
    Err(Failure("the expected display update never came".into()))
}
