//! The GPU under Debian's stock driver, on a host with a real udmabuf.

use std::{fs, os::fd::AsFd};

use fanlight_api::VmConfig;
use fanlight_devices::virtio::{
    gpu::{self, DisplayHandle, Mode, Pixels},
    input::{EV_ABS, EV_KEY, EV_REL, InputEvent, KEY_A},
};
use fanlight_tests::{
    Context, Failure, Result,
    embedded::{Embedded, zeroes},
    guest::{Assets, GuestBuilder, ensure, value},
};

use crate::Test;

pub const TESTS: &[(&str, Test)] = &[
    ("gpu::outputs_as_the_guest_sees_them", outputs),
    ("gpu::the_console_pixel_by_pixel", console),
    ("gpu::an_exported_frame_is_shared", shared),
    ("gpu::outputs_come_and_go_and_grow", hotplug),
    ("gpu::drivers_unbind_and_bind", rebind),
    ("gpu::keys_pointer_and_touch", input),
];

const MODULES: &[&str] = &["virtio_gpu", "virtio_input"];

fn guest(assets: &Assets, script: &str) -> Result<GuestBuilder> {
    assets.guest(script).modules(MODULES)
}

/// A guest in this process that runs the lines typed on its console, once it has said "ready".
fn shell(assets: &Assets, gpu: &str, disk: Option<u64>) -> Result<Embedded> {
    let guest = guest(
        assets,
        "echo 0 > /sys/class/graphics/fbcon/cursor_blink
        echo ready; while read -r line; do eval \"$line\"; done",
    )?;
    let mut config = VmConfig {
        gpu: Some(gpu.parse().context("bad GPU")?),
        memory: "256M".parse().context("bad memory")?,
        ..VmConfig::default()
    };
    if let Some(size) = disk {
        let path = guest.path("disk");
        zeroes(&path, size)?;
        let disk = format!("path={}", path.display());
        config.disk.push(disk.parse().context("bad disk")?);
    }
    let guest = guest.embed(config)?;
    guest.wait_for("ready")?;
    Ok(guest)
}

fn display(guest: &Embedded) -> Result<&DisplayHandle> {
    Ok(&guest.graphics()?.display)
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
    Ok(())
}

/// Fails unless the picture is what the guest's framebuffer device holds.
fn same(picture: &Pixels, framebuffer: &[u8]) -> Result<()> {
    let stride = picture.width as usize * 4;
    for y in 0..picture.height {
        for x in 0..picture.width {
            let at = y as usize * stride + x as usize * 4;
            let Some(&[blue, green, red, _]) = framebuffer.get(at..at + 4) else {
                return Err(Failure(format!("the guest's dump ends at {x},{y}")));
            };
            let shown = picture.rgba(x, y);
            ensure(
                shown == Some([red, green, blue, 0xff]),
                format!("pixel {x},{y}: {shown:?}, and the guest has {red},{green},{blue}"),
            )?;
        }
    }
    Ok(())
}

fn console(assets: &Assets) -> Result<()> {
    let guest = shell(assets, "outputs=1024x768", Some(8 << 20))?;
    guest.type_line("printf '\\033[31mred \\033[44mon blue\\033[0m\\033[?25l' > /dev/tty1")?;
    guest.type_line("sleep 1; cat /dev/fb0 > /dev/vda; sync; echo dum''ped")?;
    guest.wait_for("dumped")?;
    let picture = display(&guest)?.read_scanout(0).context("no picture")?;
    ensure((picture.width, picture.height) == (1024, 768), "wrong size")?;
    let dump = fs::read(guest.path("disk")).context("no dump")?;
    same(&picture, &dump)?;
    // Something is on it: text, and the colours of the line above.
    let pixels = || (0..768).flat_map(|y| (0..1024).map(move |x| (x, y)));
    let count = |rgb: [u8; 3]| {
        pixels()
            .filter(|&(x, y)| picture.rgba(x, y).is_some_and(|p| p[..3] == rgb))
            .count()
    };
    let (blue, red) = (count([0, 0, 0xaa]), count([0xaa, 0, 0]));
    let said = format!("{blue} blue, {red} red pixels:\n{}", guest.transcript());
    ensure(blue > 300 && red > 50, said)?;
    // The same as a file.
    let mut file = Vec::new();
    picture.write_png(&mut file).context("no PNG")?;
    ensure(file.starts_with(b"\x89PNG"), "not a PNG")?;
    let copied = display(&guest)?.statistics().transferred_bytes;
    ensure(copied == 0, format!("{copied} bytes were copied"))
}

fn shared(assets: &Assets) -> Result<()> {
    let guest = shell(assets, "outputs=640x480", None)?;
    let display = display(&guest)?;
    guest.wait_until("something is shown", || {
        display.frame(0).is_ok_and(|frame| frame.is_some())
    })?;
    let image = display.export_scanout(0).context("no dma-buf")?;
    let layout = (image.width, image.height, image.stride, image.offset);
    ensure(layout == (640, 480, 2560, 0), format!("{layout:?}"))?;
    ensure(image.fourcc == u32::from_le_bytes(*b"XR24"), "not XRGB")?;
    let again = display.export_scanout(0).context("no dma-buf")?;
    ensure(
        identity(&image.fd)? == identity(&again.fd)?,
        "two dma-bufs of one blob",
    )?;

    let mapped = Mapping::new(&image.fd, 640 * 480 * 4)?;
    let at = 100 * 2560 + 40;
    let before = mapped.read(at);
    let flushes = display.statistics().flushes;
    guest.type_line("printf 'ABCD' | dd of=/dev/fb0 bs=1 seek=256040 conv=notrunc 2>/dev/null")?;
    guest.wait_until("a write is seen", || mapped.read(at) == *b"ABCD")?;
    ensure(before != *b"ABCD", "it was there before")?;
    guest.wait_until("a write is flushed", || {
        display.statistics().flushes > flushes
    })
}

/// What tells one dma-buf from another.
fn identity(fd: impl AsFd) -> Result<u64> {
    Ok(rustix::fs::fstat(fd)
        .context("cannot stat a dma-buf")?
        .st_ino)
}

/// A dma-buf in this process's memory.
struct Mapping(*mut u8, usize);

impl Mapping {
    fn new(fd: impl AsFd, len: usize) -> Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let at = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ,
                MapFlags::SHARED,
                fd,
                0,
            )
        };
        Ok(Self(at.context("cannot map a dma-buf")?.cast(), len))
    }

    fn read(&self, at: usize) -> [u8; 4] {
        assert!(at + 4 <= self.1);
        // SAFETY: within the mapping, and any bytes are such an array; the guest may write meanwhile, which
        // a volatile read allows for.
        unsafe { self.0.add(at).cast::<[u8; 4]>().read_volatile() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's, and nothing refers to it any more.
        let _ = unsafe { rustix::mm::munmap(self.0.cast(), self.1) };
    }
}

fn hotplug(assets: &Assets) -> Result<()> {
    let guest = shell(assets, "outputs=800x600+640x480", None)?;
    let display = display(&guest)?;
    // The console's own probe leaves out what is larger than its framebuffer: another one is asked for.
    let ask = |name: &str| {
        guest.type_line(&format!(
            "cd /sys/class/drm; echo {name}: \
             $(for i in 1 2 3; do echo detect > card0-Virtual-$i/status; \
             echo $(cat card0-Virtual-$i/status) \
             $(head -n 1 card0-Virtual-$i/modes) /; done)"
        ))
    };
    let reaches = |expected: &str| -> Result<()> {
        for round in 0..200 {
            ask(&format!("r{round}"))?;
            guest.wait_for(&format!("\nr{round}:"))?;
            if guest.transcript().contains(expected) {
                return Ok(());
            }
        }
        Err(Failure(format!(
            "never {expected:?}:\n{}",
            guest.transcript()
        )))
    };
    reaches("connected 800x600 / connected 640x480 / disconnected /")?;
    let set = |index, mode: Option<(u32, u32)>| {
        let mode = mode.map(|(width, height)| Mode { width, height });
        display
            .set_output(index, mode)
            .context("cannot set an output")
    };
    set(0, Some((1371, 801)))?;
    set(1, None)?;
    set(2, Some((1024, 768)))?;
    reaches("connected 1371x801 / disconnected / connected 1024x768 /")?;
    set(2, None)?;
    set(1, Some((640, 480)))?;
    reaches("connected 1371x801 / connected 640x480 / disconnected /")
}

fn rebind(assets: &Assets) -> Result<()> {
    let guest = shell(assets, "outputs=800x600", None)?;
    let display = display(&guest)?;
    let lit = || display.frame(0).is_ok_and(|frame| frame.is_some());
    for round in 0..3 {
        guest.wait_until("something is shown", lit)?;
        display.export_scanout(0).context("no dma-buf")?;
        guest.type_line(
            "echo 0 > /sys/class/vtconsole/vtcon1/bind; cd /sys/bus/virtio/drivers/virtio_gpu; \
             d=$(ls -d virtio*); echo $d > unbind",
        )?;
        guest.wait_until("nothing is shown", || !lit())?;
        let held = display.statistics().resource_memory;
        ensure(held == 0, format!("{held} bytes are left in round {round}"))?;
        guest.type_line("echo $d > bind; echo 1 > /sys/class/vtconsole/vtcon1/bind")?;
    }
    guest.wait_until("something is shown at last", lit)
}

fn input(assets: &Assets) -> Result<()> {
    let guest = shell(assets, "", None)?;
    guest.type_line("grep -E 'Name=.Fanlight|Handlers' /proc/bus/input/devices; echo lis''ted")?;
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
    let event = |type_, code, value| InputEvent { type_, code, value };
    let reports = [
        ("keyboard", vec![event(EV_KEY, KEY_A, 1)]),
        (
            "pointer",
            vec![event(EV_ABS, 0, 1234), event(EV_REL, 8, -1)],
        ),
        (
            "touch screen",
            vec![event(EV_ABS, 0x39, 7), event(EV_ABS, 0x35, 99)],
        ),
    ];
    for (handle, (name, report)) in guest.graphics()?.inputs.iter().zip(reports) {
        // struct input_event: 16 bytes of time, then type, code, value.
        let bytes = 24 * (report.len() + 1);
        guest.type_line(&format!(
            "(echo open''ed {}; head -c {bytes} | od -An -v -w24 -td2 -j0 | sed 's/^/{}:/'; echo do''ne {}) \
             < /dev/input/{}",
            handle.kind().name().replace(' ', "-"),
            handle.kind().name().replace(' ', "-"),
            handle.kind().name().replace(' ', "-"),
            handler(name)?
        ))?;
        let word = name.replace(' ', "-");
        guest.wait_for(&format!("opened {word}"))?;
        handle.send(&report).context("cannot send")?;
        guest.wait_for(&format!("done {word}"))?;
        let said = guest.transcript();
        let got: Vec<Vec<i32>> = said
            .lines()
            .filter_map(|line| line.strip_prefix(&format!("{word}:")))
            .map(|line| {
                let words = line.split_whitespace().filter_map(|w| w.parse().ok());
                words.collect()
            })
            .collect();
        let sent: Vec<_> = report
            .iter()
            .map(|e| (i32::from(e.type_), i32::from(e.code), e.value))
            .chain([(0, 0, 0)])
            .collect();
        let got: Vec<_> = got
            .iter()
            .filter_map(|w| Some((*w.get(8)?, *w.get(9)?, *w.get(10)?)))
            .collect();
        ensure(got == sent, format!("{word}: {got:?} of {sent:?}\n{said}"))?;
    }
    Ok(())
}
