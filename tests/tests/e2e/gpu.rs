//! The GPU under Debian's stock driver, on a host with a real udmabuf.

use std::{fs, os::fd::AsFd};

use fanlight_api::display::{DisplayUpdate, PixelLocation, ViewerMessage};
use fanlight_devices::virtio::{
    gpu::{self, Mode},
    input::{EV_ABS, EV_KEY, KEY_A},
};
use fanlight_tests::{
    Context, Failure, Result, ensure,
    host_side::{
        display::Screen,
        guest::{Assets, Guest, GuestBuilder},
        test_case::TestCase,
    },
    value,
};

pub const TESTS: &[TestCase] = &[
    TestCase::new("gpu::outputs_as_the_guest_sees_them", outputs),
    TestCase::new("gpu::the_console_pixel_by_pixel", console),
    TestCase::new("gpu::an_exported_frame_is_shared", shared),
    TestCase::new("gpu::outputs_come_and_go_and_grow", hotplug),
    TestCase::new("gpu::drivers_unbind_and_bind", rebind),
    TestCase::new("gpu::keys_pointer_and_touch", input),
];

const MODULES: &[&str] = &["virtio_gpu", "virtio_input"];

fn guest(assets: &Assets, script: &str) -> Result<GuestBuilder> {
    assets.guest(script).modules(MODULES)
}

/// A guest that runs the lines typed on its console, once it has said "ready".
fn shell(assets: &Assets, gpu: &str, disk: Option<u64>) -> Result<(Guest, Screen)> {
    let mut guest = guest(
        assets,
        "echo 0 > /sys/class/graphics/fbcon/cursor_blink
        echo ready; while read -r line; do eval \"$line\"; done",
    )?;
    if let Some(size) = disk {
        let path = guest.path("disk");
        fs::File::create(&path)
            .and_then(|file| file.set_len(size))
            .context("cannot make a disk")?;
        guest = guest.option("--disk", format!("path={}", path.display()));
    }
    let socket = guest.path("api");
    let guest = guest.option("--gpu", gpu).option("--api-socket", &socket);
    let mut guest = guest.start()?;
    guest.wait_for("ready")?;
    Ok((guest, Screen::connect(&socket)?))
}

const OUTPUTS: &str = "cd /sys/class/drm
    echo driver: $(basename $(readlink -f card0/device/virtio*/driver))
    echo connected: $(cat card0-Virtual-*/status | grep -cx connected)
    echo connectors: $(ls -d card0-Virtual-* | wc -l)
    echo mode 1: $(head -n 1 card0-Virtual-1/modes)
    echo mode 2: $(head -n 1 card0-Virtual-2/modes)
    echo mode 3: $(head -n 1 card0-Virtual-3/modes)
    for i in 1 2 3; do echo edid $i: $(od -An -v -tx1 card0-Virtual-$i/edid | tr -d ' \\n'); done
    echo framebuffer: $(cat /sys/class/graphics/fb0/name)
    dmesg | grep -i 'features: ' | sed 's/^/dmesg: /'
    echo complaints: $(dmesg | grep -ciE 'EDID.*(invalid|corrupt|checksum)|virtio_gpu.*(ERROR|response)')";

fn outputs(assets: &Assets) -> Result<()> {
    let said = guest(assets, OUTPUTS)?
        .option(
            "--gpu",
            "outputs=1920x1080+1366x768+7680x4320,edid-name=Panel",
        )
        .run()?;
    ensure(value(&said, "driver:")? == "virtio_gpu", &said)?;
    ensure(value(&said, "connected:")? == "3", &said)?;
    ensure(value(&said, "connectors:")? == "16", &said)?;
    ensure(said.contains("+edid +resource_blob"), &said)?;
    ensure(said.contains("+blob_alignment"), &said)?;
    ensure(value(&said, "complaints:")? == "0", &said)?;
    ensure(value(&said, "framebuffer:")? == "virtio_gpudrmfb", &said)?;
    let modes = [(1920, 1080), (1366, 768), (7680, 4320)];
    for (index, (width, height)) in modes.into_iter().enumerate() {
        let mode = value(&said, &format!("mode {}:", index + 1))?;
        ensure(mode == format!("{width}x{height}"), &said)?;
        let edid = gpu::edid(Mode { width, height }, "Panel", index);
        let edid: String = edid.iter().map(|byte| format!("{byte:02x}")).collect();
        ensure(
            value(&said, &format!("edid {}:", index + 1))? == edid,
            &said,
        )?;
    }
    valid_edids(assets)
}

/// Checks EDIDs of many sizes with Debian's edid-decode.
fn valid_edids(assets: &Assets) -> Result<()> {
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    for (index, width) in [32, 641, 1366, 1920, 4096, 7680, 16384]
        .into_iter()
        .enumerate()
    {
        for height in [32, 480, 801, 2160, 4095, 16384] {
            let path = dir.path().join("edid");
            let edid = gpu::edid(Mode { width, height }, "Panel", index * 2);
            fs::write(&path, edid).context("cannot write an EDID")?;
            let output = assets
                .graphics_tools
                .command("usr/bin/edid-decode")
                .arg("--check")
                .arg(&path)
                .output()
                .context("cannot run edid-decode")?;
            let said = String::from_utf8_lossy(&output.stdout);
            ensure(
                output.status.success() && said.contains("EDID conformity: PASS"),
                format!("{width}x{height}: {}\n{said}", output.status),
            )?;
        }
    }
    Ok(())
}

fn console(assets: &Assets) -> Result<()> {
    let (mut guest, mut screen) = shell(assets, "outputs=1024x768", Some(8 << 20))?;
    guest.send("printf '\\033[31mred \\033[44mon blue\\033[0m\\033[?25l' > /dev/tty1\n")?;
    guest.send("sleep 1; cat /dev/fb0 > /dev/vda; sync; echo dum''ped\n")?;
    guest.wait_for("dumped")?;
    let picture = screen.picture(0)?;
    let picture = picture.ok_or_else(|| Failure("nothing is shown".into()))?;
    ensure(picture.size() == (1024, 768), "wrong size")?;
    let dump = fs::read(guest.path("disk")).context("no dump")?;
    let held = |x: u32, y: u32| {
        let at = (y * 1024 + x) as usize * 4;
        [dump[at + 2], dump[at + 1], dump[at]]
    };
    if let Some(wrong) = picture.differs(held) {
        return Err(Failure(format!("the guest has another picture: {wrong}")));
    }
    // The picture has content: text, and the colours of the line above.
    let (blue, red) = (picture.count([0, 0, 0xaa]), picture.count([0xaa, 0, 0]));
    let said = format!("{blue} blue, {red} red pixels:\n{}", guest.transcript());
    ensure(blue > 300 && red > 50, said)?;
    let shown = screen.export(0)?;
    ensure(
        shown.picture.location == PixelLocation::GuestRam,
        "the pixels were copied",
    )
}

fn shared(assets: &Assets) -> Result<()> {
    let (mut guest, mut screen) = shell(assets, "outputs=640x480", None)?;
    screen.wait_lit(0, true)?;
    let shown = screen.export(0)?;
    let picture = &shown.picture;
    let layout = (
        picture.width,
        picture.height,
        picture.stride,
        picture.offset,
    );
    ensure(layout == (640, 480, 2560, 0), format!("{layout:?}"))?;
    ensure(picture.fourcc == u32::from_le_bytes(*b"XR24"), "not XRGB")?;
    let again = screen.export(0)?;
    ensure(
        identity(shown.fd())? == identity(again.fd())?,
        "two dma-bufs of one blob",
    )?;
    let before = shown.pixel(10, 100);
    let mut news = screen.watch(false)?;
    news.picture(0)?;
    guest.send("printf 'ABCD' | dd of=/dev/fb0 bs=1 seek=256040 conv=notrunc 2>/dev/null; echo writ''ten\n")?;
    guest.wait_for("written")?;
    ensure(
        before != *b"ABCD",
        "the pixel had the value before the write",
    )?;
    ensure(
        shown.pixel(10, 100) == *b"ABCD",
        "the dma-buf does not show a write",
    )?;
    news.find(|news, _| matches!(news, DisplayUpdate::Damage { output: 0, .. }).then_some(()))
}

/// Identifies a dma-buf by its inode number.
fn identity(fd: impl AsFd) -> Result<u64> {
    Ok(rustix::fs::fstat(fd)
        .context("cannot stat a dma-buf")?
        .st_ino)
}

fn hotplug(assets: &Assets) -> Result<()> {
    let (mut guest, mut screen) = shell(assets, "outputs=800x600+640x480", None)?;
    let mut round = 0;
    // The console's own probe omits modes that exceed its framebuffer, so this asks for a new probe.
    let mut reaches = |guest: &mut Guest, expected: &str| -> Result<()> {
        for _ in 0..200 {
            round += 1;
            guest.send(&format!(
                "cd /sys/class/drm; echo r{round}: \
                 $(for i in 1 2 3; do echo detect > card0-Virtual-$i/status; \
                 echo $(cat card0-Virtual-$i/status) \
                 $(head -n 1 card0-Virtual-$i/modes) /; done)\n"
            ))?;
            guest.wait_for(&format!("\nr{round}:"))?;
            if guest.transcript().contains(expected) {
                return Ok(());
            }
        }
        let said = guest.transcript();
        Err(Failure(format!("never {expected:?}:\n{said}")))
    };
    reaches(
        &mut guest,
        "connected 800x600 / connected 640x480 / disconnected /",
    )?;
    screen.set_output(0, Some("1371x801"))?;
    screen.set_output(1, None)?;
    screen.set_output(2, Some("1024x768"))?;
    reaches(
        &mut guest,
        "connected 1371x801 / disconnected / connected 1024x768 /",
    )?;
    screen.set_output(2, None)?;
    screen.set_output(1, Some("640x480"))?;
    reaches(
        &mut guest,
        "connected 1371x801 / connected 640x480 / disconnected /",
    )
}

fn rebind(assets: &Assets) -> Result<()> {
    let (mut guest, mut screen) = shell(assets, "outputs=800x600", None)?;
    for _ in 0..3 {
        screen.wait_lit(0, true)?;
        screen.export(0)?;
        guest.send(
            "echo 0 > /sys/class/vtconsole/vtcon1/bind; cd /sys/bus/virtio/drivers/virtio_gpu; \
             d=$(ls -d virtio*); echo $d > unbind\n",
        )?;
        screen.wait_lit(0, false)?;
        guest.send("echo $d > bind; echo 1 > /sys/class/vtconsole/vtcon1/bind\n")?;
    }
    screen.wait_lit(0, true)
}

fn input(assets: &Assets) -> Result<()> {
    let (mut guest, mut screen) = shell(assets, "outputs=640x480", None)?;
    guest.send("grep -E 'Name=.Fanlight|Handlers' /proc/bus/input/devices; echo lis''ted\n")?;
    guest.wait_for("listed")?;
    let said = guest.transcript();
    let handler = |name: &str| -> Result<String> {
        let (_, rest) = said
            .split_once(&format!("\"Fanlight {name}\""))
            .ok_or_else(|| Failure(format!("no {name}: {said}")))?;
        let event = rest
            .split_whitespace()
            .find(|word| word.starts_with("event"));
        event
            .map(str::to_owned)
            .ok_or_else(|| Failure(said.clone()))
    };
    let mut news = screen.drive()?;
    let cases = [
        (
            "keyboard",
            ViewerMessage::Key {
                code: KEY_A,
                pressed: true,
            },
            vec![(EV_KEY, KEY_A, 1), (0, 0, 0)],
        ),
        (
            "pointer",
            ViewerMessage::Pointer {
                output: 0,
                x: 0.5,
                y: 0.25,
            },
            vec![(EV_ABS, 0, 16383), (EV_ABS, 1, 8191), (0, 0, 0)],
        ),
        (
            "touch screen",
            ViewerMessage::Touch {
                output: 0,
                finger: 5,
                at: Some([0.5, 1.0]),
            },
            vec![
                (EV_ABS, 0x39, 0),
                (EV_ABS, 0x35, 16383),
                (EV_ABS, 0x36, 32767),
            ],
        ),
    ];
    for (name, says, expected) in cases {
        let word = name.replace(' ', "-");
        // struct input_event: 16 bytes of time, then type, code, value.
        let bytes = 24 * expected.len();
        guest.send(&format!(
            "(echo open''ed {word}; head -c {bytes} | od -An -v -w24 -td2 -j0 | sed 's/^/{word}:/'; \
             echo do''ne {word}) < /dev/input/{}\n",
            handler(name)?
        ))?;
        guest.wait_for(&format!("opened {word}"))?;
        news.say(&says)?;
        guest.wait_for(&format!("done {word}"))?;
        let said = guest.transcript();
        let got: Vec<(u16, u16, i32)> = said
            .lines()
            .filter_map(|line| line.strip_prefix(&format!("{word}:")))
            .filter_map(|line| {
                let words: Vec<i32> = line
                    .split_whitespace()
                    .filter_map(|w| w.parse().ok())
                    .collect();
                Some((
                    *words.get(8)? as u16,
                    *words.get(9)? as u16,
                    *words.get(10)?,
                ))
            })
            .collect();
        ensure(
            got == expected,
            format!("{word}: {got:?}, not {expected:?}\n{said}"),
        )?;
    }
    Ok(())
}
