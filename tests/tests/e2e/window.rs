//! `fanlight view` in Weston: the window's content, and a guest whose viewers misbehave.

use std::{
    fs,
    io::Write,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Instant,
};

use fanlight_api::{
    client::Client,
    display::{SubscribeDisplay, ViewerMessage},
    methods::{DisplaySubscribe, VmInfo, VmStats},
    stream::MessageStream,
    types::NoParams,
};
use fanlight_tests::{
    Context, Failure, Result, ensure,
    host_side::{
        compositor::Viewer, drawing_guest::DrawingGuest, guest::Assets, test_case::TestCase,
        watcher::Watcher,
    },
};
use rustix::process::{Pid, Signal, kill_process};

use super::{
    compositor::{self, take_picture},
    drm::UNBIND,
    view::{HEIGHT, PATIENCE, WIDTH, drawing, one},
};

pub const TESTS: &[TestCase] = &[
    TestCase::new("view::a_window_in_weston", weston),
    TestCase::new(
        "view::frames_without_a_copy_and_viewers_that_misbehave",
        painted,
    ),
];

/// Frames that the guest draws while a viewer misbehaves.
const FRAMES: u32 = 60;

fn weston(assets: &Assets) -> Result<()> {
    let (mut guest, mut client, socket) = drawing(assets)?;
    let weston = compositor::weston(assets, "pixman")?;
    let viewer = weston.viewer(&assets.fanlight, &socket)?;
    weston.wait_for(&take_picture(&mut client)?)?;
    guest.send(
        "cat /tmp/picture | tr '\\000-\\377' '\\001-\\377\\000' > /dev/fb0; echo pain''ted\n",
    )?;
    guest.wait_for("painted")?;
    let second = take_picture(&mut client)?;
    weston.wait_for(&second)?;
    let said = viewer.said();
    ensure(said.matches("they are copied").count() == 1, said)?;
    // The guest survives a viewer that dies.
    drop(viewer);
    guest.send("cat /tmp/picture > /dev/fb0; echo a''gain\n")?;
    guest.wait_for("again")?;
    let mut viewer = weston.viewer(&assets.fanlight, &socket)?;
    weston.wait_for(&take_picture(&mut client)?)?;
    // A guest without a driver shows nothing, and the window is black.
    guest.send(&format!("{UNBIND}; echo un''bound\n"))?;
    guest.wait_for("unbound")?;
    weston.wait_for(&vec![0; second.len()])?;
    guest.send("poweroff -f\n")?;
    guest.expect_exit(0)?;
    let status = viewer
        .process
        .wait()
        .context("cannot wait for the viewer")?;
    ensure(status.success(), format!("the viewer ended with {status}"))
}

/// A guest with a program that draws on request. No viewer is connected yet.
pub fn painting(assets: &Assets) -> Result<(DrawingGuest, Client, PathBuf)> {
    let script = format!("exec guest-agent draw {WIDTH} {HEIGHT} 4000 0");
    let guest = assets
        .guest(&script)
        .modules(&["virtio_gpu"])?
        .option("--gpu", format!("outputs={WIDTH}x{HEIGHT}"));
    let socket = guest.path("api");
    let mut guest = guest.option("--api-socket", &socket).start()?;
    guest.wait_for("agent: shows")?;
    let client = Client::connect(&socket).context("cannot connect")?;
    Ok((DrawingGuest::new(guest), client, socket))
}

/// Number of dma-buf mappings of a process.
fn mapped_dmabufs(pid: u32) -> Result<usize> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).context("cannot read mappings")?;
    Ok(maps
        .lines()
        .filter(|line| line.contains("/dmabuf:"))
        .count())
}

/// How many of these flushes took longer than a viewer may hold a frame.
fn flush(drawing: &mut DrawingGuest) -> Result<u32> {
    match drawing.ask(&format!("flush {FRAMES}"))?[..] {
        [_, _, _, late] => Ok(late as u32),
        _ => Err(Failure(drawing.guest.transcript())),
    }
}

fn painted(assets: &Assets) -> Result<()> {
    let (mut drawing, mut client, socket) = painting(assets)?;
    let weston = compositor::weston(assets, "gl")?;
    let viewer = weston.viewer(&assets.fanlight, &socket)?;
    let mut shows = |drawing: &mut DrawingGuest, number: u32| -> Result<()> {
        drawing.ask(&format!("draw {number}"))?;
        let wanted = take_picture(&mut client)?;
        weston
            .wait_for(&wanted)
            .map_err(|error| Failure::new(error, viewer.said()))
    };
    shows(&mut drawing, 1)?;
    shows(&mut drawing, 2)?;
    // The compositor reads the guest's memory directly.
    let said = viewer.said();
    ensure(said.is_empty(), format!("the viewer reports: {said}"))?;
    ensure(
        mapped_dmabufs(weston.pid())? > 0,
        "Weston has no dma-buf mapped",
    )?;
    ensure(
        mapped_dmabufs(viewer.process.id())? == 0,
        "the viewer reads pixels",
    )?;
    stopped(&mut drawing, &socket, &viewer)?;
    // The viewer catches up with the frames that it missed.
    shows(&mut drawing, 3)?;
    drop(viewer);
    flooded(&mut drawing, &socket)?;
    let viewer = weston.viewer(&assets.fanlight, &socket)?;
    drawing.ask("draw 4")?;
    weston.wait_for(&take_picture(&mut client)?)?;
    ensure(viewer.said().is_empty(), viewer.said())
}

/// A stopped viewer delays one frame, and only for a limited time. Another viewer sees all frames.
fn stopped(drawing: &mut DrawingGuest, socket: &Path, viewer: &Viewer) -> Result<()> {
    let mut client = Client::connect(socket).context("cannot connect")?;
    let other = Watcher::start(&mut client, true)?;
    let signal = |signal| {
        kill_process(Pid::from_child(&viewer.process), signal).context("cannot send a signal")
    };
    signal(Signal::STOP)?;
    let late = flush(drawing)?;
    let heard = other.stop()?;
    signal(Signal::CONT)?;
    // A busy emulator delays some frames; waiting for a viewer would delay all.
    ensure(
        late < FRAMES * 3 / 4,
        format!("{late} of {FRAMES} frames waited for a stopped viewer"),
    )?;
    ensure(
        heard >= u64::from(FRAMES / 2),
        format!("another viewer saw {heard} of {FRAMES} frames"),
    )
}

/// Viewers that send without end and never read.
fn flooded(drawing: &mut DrawingGuest, socket: &Path) -> Result<()> {
    let mut client = Client::connect(socket).context("cannot connect")?;
    let memory = |client: &mut Client| -> Result<u64> {
        let stats = client.call::<VmStats>(&NoParams {});
        Ok(stats.context("vm.stats")?.memory.resident)
    };
    let before = memory(&mut client)?;
    let end = Arc::new(AtomicBool::new(false));
    let mut floods = Vec::new();
    let start = Instant::now();
    while floods.len() < 2 {
        let watch = SubscribeDisplay {
            pace: true,
            drive: floods.is_empty(),
            ..SubscribeDisplay::default()
        };
        let (stream, fds) = client
            .call_with::<DisplaySubscribe>(&watch, &[])
            .context("display.subscribe")?;
        // The server may not have seen yet that the previous driving viewer has gone.
        if stream.drives == watch.drive {
            let (end, fd) = (end.clone(), one(fds)?);
            floods.push(thread::spawn(move || flood(fd, &end)));
        }
        ensure(start.elapsed() < PATIENCE, "no viewer may drive")?;
    }
    // An invalid message closes the stream that it came on.
    let (_, fds) = client
        .call_with::<DisplaySubscribe>(&SubscribeDisplay::default(), &[])
        .context("display.subscribe")?;
    let mut nonsense = UnixStream::from(one(fds)?);
    let _ = nonsense.write_all(&vec![b'{'; 4 << 20]);
    for _ in 0..3 {
        flush(drawing)?;
        let info = client.call::<VmInfo>(&NoParams {});
        info.context("vm.info while the stream is flooded")?;
    }
    let grown = memory(&mut client)?.saturating_sub(before);
    end.store(true, Ordering::Release);
    for flood in floods {
        let said = flood
            .join()
            .map_err(|_| Failure("a flood panicked".into()))?;
        ensure(said? > 1000, "too few messages for a flood")?;
    }
    ensure(
        grown < 32 << 20,
        format!("a flood of messages made Fanlight grow by {grown} bytes"),
    )
}

/// Sends all kinds of viewer messages without end, and never reads. Returns the number of messages.
fn flood(fd: OwnedFd, end: &AtomicBool) -> Result<u64> {
    let mut stream = MessageStream::new(UnixStream::from(fd)).context("a stream")?;
    let mut said = 0;
    for number in (0u32..).take_while(|_| !end.load(Ordering::Acquire)) {
        if stream.is_full() {
            stream.flush().context("cannot flush the flooding stream")?;
            thread::yield_now();
            continue;
        }
        let says = match number % 7 {
            0 => ViewerMessage::Release {
                serial: u64::from(number),
            },
            1 => ViewerMessage::Resize {
                output: 0,
                width: 600 + number % 512,
                height: 400 + number % 256,
            },
            2 => ViewerMessage::Key {
                code: (number % 255) as u16,
                pressed: number % 4 < 2,
            },
            3 => ViewerMessage::Pointer {
                output: number,
                x: f64::from(number),
                y: -0.5,
            },
            4 => ViewerMessage::Touch {
                output: 0,
                finger: number as i32,
                at: Some([0.5, 2.0]),
            },
            5 => ViewerMessage::CopyDeviceMemory,
            _ => ViewerMessage::Wheel {
                horizontal: i32::MIN,
                vertical: i32::MAX,
            },
        };
        stream
            .send(&says, vec![])
            .context("the stream of a flood")?;
        said += 1;
    }
    Ok(said)
}
