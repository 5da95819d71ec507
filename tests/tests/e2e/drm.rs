//! The GPU under DRM clients: Debian's in a stock guest, and a test program that drives the device directly.

use std::{fs, path::Path};

use fanlight_api::{
    display::{DisplayUpdate, FrameMemory, PixelLocation},
    methods::VmReset,
    types::NoParams,
};
use fanlight_tests::{
    Context, Failure, Result,
    common::pixel_formats,
    ensure,
    host_side::{
        display::{Colour, Picture, Screen, copied},
        guest::{Assets, Guest, GuestBuilder},
        test_case::TestCase,
    },
};

pub const TESTS: &[TestCase] = &[
    TestCase::new("drm::patterns_and_cursors_on_two_outputs", patterns),
    TestCase::new("drm::flips_outlive_everything", flips),
    TestCase::new("drm::every_format_and_other_pages", formats),
    TestCase::new("drm::frames_without_dma_bufs", copies).alone(),
    TestCase::new("drm::intel_gpu_tools", intel_gpu_tools),
];

/// Runs the lines that are typed. The terminal echoes them, so marks in them are split by quotes.
const SHELL: &str = "echo 0 > /sys/class/graphics/fbcon/cursor_blink
    echo ready; while read -r line; do eval \"$line\"; done";
/// A DRM client.
pub const MODETEST: &str = "usr/bin/modetest";

/// A guest with a GPU and an API.
fn guest(assets: &Assets, gpu: &str, tools: &[&str]) -> Result<(Guest, Screen)> {
    let mut guest: GuestBuilder = assets.guest(SHELL).modules(&["virtio_gpu"])?;
    for tool in tools {
        guest = guest.graphics_tool(tool)?;
    }
    let socket = guest.path("api");
    let guest = guest.option("--gpu", gpu).option("--api-socket", &socket);
    let mut guest = guest.start()?;
    guest.wait_for("ready")?;
    Ok((guest, Screen::connect(&socket)?))
}

/// The colour bars that modetest draws first, on a screen of this size.
fn bars(width: u32, height: u32) -> impl Fn(u32, u32) -> Colour {
    const TOP: [Colour; 7] = [
        [192, 192, 192],
        [192, 192, 0],
        [0, 192, 192],
        [0, 192, 0],
        [192, 0, 192],
        [192, 0, 0],
        [0, 0, 192],
    ];
    const MIDDLE: [Colour; 7] = [
        [0, 0, 192],
        [19, 19, 19],
        [192, 0, 192],
        [19, 19, 19],
        [0, 192, 192],
        [19, 19, 19],
        [192, 192, 192],
    ];
    const BOTTOM: [Colour; 8] = [
        [0, 33, 76],
        [255, 255, 255],
        [50, 0, 106],
        [19, 19, 19],
        [9, 9, 9],
        [19, 19, 19],
        [29, 29, 29],
        [19, 19, 19],
    ];
    move |x, y| {
        let seventh = (x * 7 / width) as usize;
        if y < height * 6 / 9 {
            TOP[seventh]
        } else if y < height * 7 / 9 {
            MIDDLE[seventh]
        } else if x < width * 5 / 7 {
            BOTTOM[(x * 4 / (width * 5 / 7)) as usize]
        } else if x < width * 6 / 7 {
            BOTTOM[((x - width * 5 / 7) * 3 / (width / 7) + 4) as usize]
        } else {
            BOTTOM[7]
        }
    }
}

/// The picture to which modetest flips.
fn plain(_: u32, _: u32) -> Colour {
    [0x77; 3]
}

fn patterns(assets: &Assets) -> Result<()> {
    let (mut guest, mut screen) = guest(assets, "outputs=800x600+640x480", &[MODETEST])?;
    // The driver has exactly these formats.
    guest.send("echo formats: $(modetest -M virtio_gpu -p | grep 'formats: [A-Z]' | sort | uniq -c) en''d\n")?;
    guest.wait_for(" end\n")?;
    let said = guest.transcript();
    ensure(
        said.contains("formats: 16 formats: AR24 16 formats: XR24 end"),
        &said,
    )?;
    let mut news = screen.watch(false)?;
    // One framebuffer for both: the second output shows its right part.
    guest.send(
        "sleep 1000 | modetest -M virtio_gpu -s Virtual-1:800x600@XR24 -s Virtual-2:640x480 -C &\n",
    )?;
    let whole = bars(800 + 640, 600);
    screen.wait_for(0, (800, 600), &whole)?;
    screen.wait_for(1, (640, 480), |x, y| whole(800 + x, y))?;
    for wanted in [0, 1] {
        let cursor = news.find(|news, fds| match news {
            DisplayUpdate::CursorImage {
                output,
                image: Some(look),
            } if output == wanted => Some((look, fds)),
            _ => None,
        });
        let (look, fds) = cursor?;
        ensure((look.width, look.height) == (64, 64), format!("{look:?}"))?;
        let mut argb = Vec::new();
        let fd = fds.into_iter().next();
        let fd = fd.ok_or_else(|| Failure("the cursor has no picture".into()))?;
        std::io::Read::read_to_end(&mut fs::File::from(fd), &mut argb).context("no cursor")?;
        ensure(argb == [0x77; 64 * 64 * 4], "the cursor looks different")?;
        let mut last = None;
        // The cursor moves right and down in steps of one pixel or more.
        for _ in 0..3 {
            last = news.find(|news, _| match news {
                DisplayUpdate::CursorPosition { output, x, y } if output == wanted => {
                    (Some((x, y)) != last).then_some(Some((x, y)))
                }
                _ => None,
            })?;
        }
        ensure(last > Some((32, 32)), format!("{last:?}"))?;
    }
    // The other test pattern.
    guest.send(
        "kill %1; wait; sleep 1000 | modetest -M virtio_gpu -s Virtual-2:640x480 -F tiles &\n",
    )?;
    screen.wait_for(1, (640, 480), |x, y| {
        let (quotient, rest) = ((x + y) / 640, (x + y) % 640);
        let rgb = 0x0013_0502 * (quotient >> 6) + 0x000a_1120 * (rest >> 6);
        [(rgb >> 16) as u8, (rgb >> 8) as u8, rgb as u8]
    })?;
    guest.send("poweroff -f\n")?;
    guest.expect_exit(0)
}

/// Flips between both pictures as fast as the driver allows, until its input ends.
pub const FLIP: &str = "sleep 1000 | modetest -M virtio_gpu -s Virtual-1:";

/// Unbinds the GPU's driver, and sets `pci` to the GPU's address.
pub const UNBIND: &str = "echo 0 > /sys/class/vtconsole/vtcon1/bind; \
    pci=$(basename $(readlink -f /sys/class/drm/card0/device)); \
    echo $pci > /sys/bus/pci/drivers/virtio-pci/unbind";

/// Waits until each of the two pictures was seen, and fails on a mixed one.
pub fn flipping(screen: &mut Screen, size: (u32, u32)) -> Result<()> {
    let bars = bars(size.0, size.1);
    let (mut seen, mut looks) = ([false; 2], 0);
    while seen != [true; 2] {
        looks += 1;
        ensure(looks < 2000, format!("only {seen:?} was seen"))?;
        let picture = screen.picture(0)?;
        let Some(picture) = picture.filter(|picture: &Picture| picture.size() == size) else {
            std::thread::sleep(std::time::Duration::from_millis(100));
            continue;
        };
        match (picture.differs(&bars), picture.differs(plain)) {
            (None, _) => seen[0] = true,
            (_, None) => seen[1] = true,
            // The text console, before the first picture.
            (Some(_), Some(_)) if seen == [false; 2] => {}
            (Some(one), Some(_)) => return Err(Failure(format!("a mixed picture: {one}"))),
        }
    }
    Ok(())
}

/// Sizes, hotplug, drivers and machines change while frames are drawn.
fn flips(assets: &Assets) -> Result<()> {
    let (mut guest, mut screen) = guest(assets, "outputs=320x240+640x480", &[MODETEST])?;
    guest.send(&format!("{FLIP}320x240 -v 2>/tmp/flips &\n"))?;
    flipping(&mut screen, (320, 240))?;
    // A paced subscriber sees every frame.
    let mut news = screen.watch(true)?;
    let mut frame = || {
        news.find(|news, _| match news {
            DisplayUpdate::Damage {
                output: 0, serial, ..
            } => Some(serial),
            _ => None,
        })
    };
    for round in 0..10u32 {
        let before = frame()?;
        let size = format!("{}x{}", 320 + 16 * round, 240 + 3 * round);
        screen.set_output(0, Some(&size))?;
        let second = round % 2 == 1;
        screen.set_output(1, second.then_some("1024x768"))?;
        for _ in 0..3 {
            ensure(frame()? > before, "a frame went backwards")?;
        }
    }
    screen.set_output(0, Some("400x304"))?;
    // The driver unbinds while its client flips, and binds again with the current size.
    guest.send(&format!("{UNBIND}; kill %1; wait; echo un''bound\n"))?;
    guest.wait_for("unbound")?;
    let dark = |screen: &mut Screen| -> Result<()> {
        let shown = screen.picture(0)?.map(|picture| picture.size());
        ensure(shown.is_none(), format!("{shown:?} is still shown"))
    };
    dark(&mut screen)?;
    guest.send(&format!(
        "echo $pci > /sys/bus/pci/drivers/virtio-pci/bind; {FLIP}400x304 -v 2>/tmp/flips &\n"
    ))?;
    flipping(&mut screen, (400, 304))?;
    // The device is removed from the bus, and a rescan finds it.
    guest.send(
        "echo 0 > /sys/class/vtconsole/vtcon1/bind; echo 1 > /sys/bus/pci/devices/$pci/remove; \
         kill %1; wait; echo re''moved\n",
    )?;
    guest.wait_for("removed")?;
    dark(&mut screen)?;
    guest.send(&format!(
        "echo 1 > /sys/bus/pci/rescan; {FLIP}400x304 -v 2>/tmp/flips &\n"
    ))?;
    flipping(&mut screen, (400, 304))?;
    // A reset in the middle of a frame.
    screen
        .client()
        .call::<VmReset>(&NoParams {})
        .context("vm.reset")?;
    guest.wait_for_times("ready", 2)?;
    guest.send(&format!("{FLIP}400x304 -v 2>/tmp/flips &\n"))?;
    flipping(&mut screen, (400, 304))?;
    guest.send("poweroff -f\n")?;
    guest.expect_exit(0)
}

/// The colour of a pixel whose channels `names` lists in byte order.
fn colour(names: &str, pixel: [u8; 4]) -> Colour {
    let byte = |name| names.find(name).map_or(0, |at| pixel[at]);
    [byte('R'), byte('G'), byte('B')]
}

fn formats(assets: &Assets) -> Result<()> {
    let (mut guest, mut screen) = guest(assets, "outputs=640x480", &[])?;
    guest.send(&format!("{UNBIND}; guest-agent show || poweroff -f\n"))?;
    guest.wait_for("agent: shown")?;
    let size = (pixel_formats::WIDTH, pixel_formats::HEIGHT);
    for (output, (names, _)) in (0..).zip(pixel_formats::FORMATS.iter().cycle().take(16)) {
        screen.wait_for(output, size, |x, y| {
            colour(names, pixel_formats::pixel(x, y, 0))
        })?;
    }
    let first = screen.export(0)?;
    ensure(
        first.picture.location == PixelLocation::GuestRam,
        "the dma-buf is not of guest RAM",
    )?;
    let round = |round| move |x, y| pixel_formats::pixel(x, y, round);
    ensure(first.is(round(0)), "the dma-buf has other pixels")?;
    let copied = screen.export(8)?;
    ensure(
        copied.picture.location == PixelLocation::Host,
        "the frame is not a copy",
    )?;
    ensure(copied.is(round(0)), "the copy has other pixels")?;

    let mut news = screen.watch(false)?;
    ensure(news.picture(0)?.is(round(0)), "the stream has other pixels")?;
    guest.send("\n")?;
    guest.wait_for("agent: detached")?;
    news.dark(0)?;
    guest.send("\n")?;
    guest.wait_for("agent: moved")?;
    let second = news.picture(0)?;
    ensure(second.is(round(1)), "the other pages are not shown")?;
    ensure(first.is(round(0)), "the first pages changed")?;
    guest.send("\n")?;
    guest.wait_for("agent: written")?;
    ensure(second.is(round(2)), "a write does not show")?;
    guest.send("\n")?;
    guest.wait_for("showed everything")?;
    // Linux's driver binds to the device again.
    guest.send("echo $pci > /sys/bus/pci/drivers/virtio-pci/bind; cat /sys/class/graphics/fb0/name; poweroff -f\n")?;
    guest.expect_exit(0)?;
    let said = guest.transcript();
    ensure(said.contains("virtio_gpudrmfb"), said)
}

const LIMIT: &str = "/sys/module/udmabuf/parameters/size_limit_mb";

/// If a frame exceeds udmabuf's limits, subscribers get a copy that is kept current.
fn copies(assets: &Assets) -> Result<()> {
    let limited = Limited::to_one_mib(Path::new(LIMIT))?;
    let (mut guest, mut screen) = guest(assets, "outputs=640x480", &[MODETEST])?;
    // Fanlight has read the limit.
    drop(limited);
    let mut news = screen.watch(true)?;
    let bars = bars(640, 480);
    let bgr = move |x, y| {
        let [red, green, blue] = bars(x, y);
        [blue, green, red]
    };
    guest.send("sleep 1000 | modetest -M virtio_gpu -s Virtual-1:640x480 &\n")?;
    loop {
        let shown = news.picture(0)?;
        ensure(
            shown.picture.memory == FrameMemory::Shared
                && shown.picture.location == PixelLocation::Host,
            format!("{:?}", shown.picture),
        )?;
        let same = |x, y| shown.pixel(x, y)[..3] == bgr(x, y);
        if (0..480).all(|y| (0..640).all(|x| same(x, y))) {
            break;
        }
    }
    // Drawing into the same framebuffer also updates the copy.
    guest.send("kill %1; wait; sleep 1; head -c 1228800 /dev/zero | tr '\\0' '\\125' > /dev/fb0; echo pain''ted\n")?;
    guest.wait_for("painted")?;
    screen.wait_for(0, (640, 480), |_, _| [0x55; 3])?;
    let mut again = screen.watch(false)?;
    let console = again.picture(0)?;
    ensure(console.is(|_, _| [0x55; 4]), "the copy has other pixels")?;
    let before = copied(screen.client())?;
    ensure(before >= 640 * 480 * 4, format!("{before} bytes"))?;
    guest.send("head -c 1228800 /dev/zero | tr '\\0' '\\063' > /dev/fb0; echo re''painted\n")?;
    guest.wait_for("repainted")?;
    again.find(|news, _| {
        matches!(news, DisplayUpdate::Damage { .. } if console.is(|_, _| [0x33; 4])).then_some(())
    })?;
    let drawn = copied(screen.client())? - before;
    ensure(drawn >= 640 * 480 * 4, format!("{drawn} bytes"))?;
    guest.send("poweroff -f\n")?;
    guest.expect_exit(0)?;
    let said = guest.transcript();
    ensure(said.matches(LIMIT).count() == 1, said)
}

/// Lowers the host's limit; dropping restores it.
struct Limited(std::path::PathBuf, String);

impl Limited {
    fn to_one_mib(path: &Path) -> Result<Self> {
        let before = fs::read_to_string(path).context("cannot read udmabuf's limit")?;
        fs::write(path, "1").context("cannot lower udmabuf's limit")?;
        Ok(Self(path.into(), before))
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        let _ = fs::write(&self.0, &self.1);
    }
}

/// The exit status of an IGT program whose requirements are missing.
const IGT_SKIP: &str = "77";

/// All programs of the package that are not specific to one vendor's GPUs.
fn intel_gpu_tools(assets: &Assets) -> Result<()> {
    let place = "usr/libexec/igt-gpu-tools/benchmarks";
    let programs = ["kms_fb_stress", "kms_vblank", "prime_lookup", "vgem_mmap"];
    let mut guest: GuestBuilder = assets
        .guest(
            "for p in kms_fb_stress kms_vblank prime_lookup vgem_mmap lsgpu; do
            case $p in prime_lookup) few='-o 8 -d 2 -a 4';; *) few=;; esac
            $p $few > /tmp/out 2>&1 < /dev/null; echo $p ended with $?; cat /tmp/out; done
            dmesg | grep -iE 'virtio_gpu.*error|BUG:|WARNING:' | sed 's/^/complaint: /'",
        )
        .modules(&["virtio_gpu", "vgem"])?
        .graphics_tool("usr/bin/lsgpu")?;
    for program in programs {
        guest = guest.graphics_tool(&format!("{place}/{program}"))?;
    }
    let said = guest.option("--gpu", "").option("--memory", "512M").run()?;
    for (program, status) in [
        // Needs a writeback connector.
        ("kms_fb_stress", IGT_SKIP),
        // Need an Intel or AMD GPU.
        ("kms_vblank", IGT_SKIP),
        ("prime_lookup", IGT_SKIP),
        ("vgem_mmap", "0"),
        ("lsgpu", "0"),
    ] {
        ensure(
            said.contains(&format!("{program} ended with {status}\n")),
            &said,
        )?;
    }
    ensure(!said.contains("complaint:"), said)
}
