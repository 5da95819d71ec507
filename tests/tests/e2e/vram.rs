//! The central path: a guest draws into a passed-through device's memory and shows it through its stock GPU driver. On
//! the host a picture has those pixels, and its dma-buf is that memory, as another device sees it.

use std::{
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    thread,
    time::{Duration, Instant},
};

use fanlight_api::{
    client::Client,
    display::{DisplayUpdate, OutputIndex, PixelLocation, Screenshot, SubscribeDisplay},
    methods::{DisplaySubscribe, GpuExportScanout, GpuScreenshot},
    stream::MessageStream,
};
use fanlight_tests::{
    Context, Failure, Result,
    common::{
        edu,
        test_pattern::{HEIGHT, SIZE, WIDTH, picture},
    },
    ensure,
    host_side::{
        dma_reader::{DmaReader, PAGE},
        guest::{Assets, Guest, GuestBuilder, GuestKernel},
        test_case::TestCase,
    },
    nested_host::L1Device,
};

use super::{
    compositor::{self, take_picture},
    vfio::{PEERS, whole_function},
    view::{PATIENCE, one, wait_for},
};

/// The same, and a display device whose memory is shown.
const PEERS_AND_DISPLAY: &[L1Device] =
    &[L1Device::Edu, L1Device::Ivshmem(64), L1Device::BochsDisplay];

pub const TESTS: &[TestCase] = &[
    TestCase::new("vram::a_bar_is_shown_and_read", shown).devices(PEERS),
    TestCase::new("vram::buffers_scatter_move_and_are_refused", buffers).devices(PEERS_AND_DISPLAY),
];

/// Vendor and device id of bochs-display, whose BAR 0 is memory.
const BOCHS_IDS: &str = "1234:1111";

/// A guest with a no-IOMMU vfio-pci and the module that exports buffers. It runs the nested host's kernel, since
/// Debian's is built without no-IOMMU mode.
fn guest(assets: &Assets, script: &str, devices: &[&str]) -> Result<(Guest, Client)> {
    let module = std::fs::read(&assets.guest_module).context("cannot read the module")?;
    let guest = assets
        .guest(script)
        .file("vram.ko", &module)
        .kernel(GuestKernel::Vmlinux)
        .cmdline("vfio.enable_unsafe_noiommu_mode=1")
        .option("--gpu", format!("outputs={WIDTH}x{HEIGHT}"))
        .option("--log", "info");
    let with = |guest: GuestBuilder, device: &&str| guest.option("--vfio", device);
    let guest = devices.iter().fold(guest, with);
    let socket = guest.path("api");
    let mut guest = guest.option("--api-socket", &socket).start()?;
    guest.wait_for("agent: shows")?;
    let client = Client::connect(&socket).context("cannot connect")?;
    Ok((guest, client))
}

/// Sends a line to the guest's agent and waits until it is done.
fn does(guest: &mut Guest, line: &str) -> Result<()> {
    let done = format!("agent: did {}\n", line.replace(' ', "-"));
    let before = guest.transcript().matches(&done).count();
    guest.send(&format!("{line}\n"))?;
    guest.wait_for_times(&done, before + 1)
}

fn export(client: &mut Client, from: PixelLocation) -> Result<OwnedFd> {
    let (exported, fds) = client
        .call_with::<GpuExportScanout>(&OutputIndex::default(), &[])
        .context("gpu.export_scanout")?;
    let is = (exported.width, exported.height, exported.offset);
    ensure(
        is == (WIDTH, HEIGHT, 0) && exported.location == from,
        format!("{exported:?}"),
    )?;
    one(fds)
}

/// The exporter of a dma-buf.
fn exporter(dmabuf: &OwnedFd) -> Result<String> {
    let path = Path::new("/proc/self/fdinfo").join(dmabuf.as_raw_fd().to_string());
    let text = std::fs::read_to_string(path).context("cannot look at a descriptor")?;
    let name = text.lines().find_map(|line| line.strip_prefix("exp_name:"));
    name.map(|name| name.trim().to_owned())
        .ok_or_else(|| Failure(format!("no dma-buf: {text}")))
}

/// Has a device read the first, a middle and the last page of a picture, and compares them with picture `number`.
fn read_by_device(reader: &DmaReader, dmabuf: &OwnedFd, number: u32) -> Result<()> {
    let rgb = picture(number);
    let pages = SIZE / PAGE;
    for page in [0, pages / 2, pages - 1] {
        let bytes = reader.page(dmabuf, page * PAGE)?;
        let read: Vec<u8> = bytes
            .as_chunks::<4>()
            .0
            .iter()
            .flat_map(|[blue, green, red, _]| [*red, *green, *blue])
            .collect();
        let first = (page * PAGE) as usize / 4 * 3;
        ensure(
            read == rgb[first..first + read.len()],
            format!("the device read wrong pixels in page {page} of picture {number}"),
        )?;
    }
    Ok(())
}

fn shows(client: &mut Client, number: u32) -> Result<()> {
    // The guest's driver waits for the device for at most 50 ms.
    let start = Instant::now();
    while !take_picture(client).is_ok_and(|seen| seen == picture(number)) {
        let late = format!("the screenshot is not picture {number}");
        ensure(start.elapsed() < PATIENCE, late)?;
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Bytes of device memory that [`shown_from`] draws into.
pub const ROOM: u64 = SIZE;

/// A guest draws at `offset` of BAR `bar` of the function at `address` and shows it. The picture and the dma-buf are of
/// that memory. While memory decoding is off neither exists; afterwards, and after a reset, both do.
pub fn shown_from(assets: &Assets, address: &str, ids: &str, bar: u32, offset: u64) -> Result<()> {
    let script = format!("guest-agent show-bar {ids} {bar} {offset}");
    let (mut guest, mut client) = guest(assets, &script, &[&format!("{address},port=1")])?;
    shows(&mut client, 1)?;
    does(&mut guest, "draw 2")?;
    shows(&mut client, 2)?;
    for way in ["memory", "force"] {
        does(&mut guest, &format!("{way} off"))?;
        ensure(
            take_picture(&mut client).is_err(),
            "a picture was taken while memory decoding is off",
        )?;
        does(&mut guest, &format!("{way} on"))?;
        shows(&mut client, 2)?;
    }
    does(&mut guest, "reset")?;
    does(&mut guest, "draw 3")?;
    shows(&mut client, 3)?;
    let by = exporter(&export(&mut client, PixelLocation::Device)?)?;
    ensure(
        by.contains("vfio"),
        format!("the dma-buf is from {by}, not from VFIO"),
    )?;
    guest.send("end\n")?;
    guest.expect_exit(0)
}

fn shown(assets: &Assets) -> Result<()> {
    let edu = whole_function(assets, edu::IDS)?;
    let memory = whole_function(assets, edu::MEMORY_IDS)?;
    let script = format!("guest-agent show-bar {} 2 {}", edu::MEMORY_IDS, 0x12_3000);
    let (mut guest, mut client) = guest(assets, &script, &[&format!("{memory},port=1")])?;
    let reader = DmaReader::open(&edu)?;
    shows(&mut client, 1)?;
    let first = export(&mut client, PixelLocation::Device)?;
    let by = exporter(&first)?;
    ensure(
        by.contains("vfio"),
        format!("the dma-buf is from {by}, not from VFIO"),
    )?;
    read_by_device(&reader, &first, 1)?;
    // The dma-buf is not a copy: later drawing appears in it.
    does(&mut guest, "draw 2")?;
    shows(&mut client, 2)?;
    read_by_device(&reader, &first, 2)?;

    let watch = SubscribeDisplay::default();
    let (_, fds) = client
        .call_with::<DisplaySubscribe>(&watch, &[])
        .context("display.subscribe")?;
    let mut stream = MessageStream::new(UnixStream::from(one(fds)?)).context("a stream")?;
    let mut heard = |there: bool| {
        wait_for(&mut stream, |news, _| match news {
            DisplayUpdate::Scanout {
                output: 0,
                frame,
                error,
            } if frame.is_some() == there => Some(error.clone()),
            _ => None,
        })
    };
    heard(true)?;
    let refused = |client: &mut Client, why: &str| {
        let said = client.call::<GpuScreenshot>(&Screenshot::default());
        let said = said.err().map(|error| error.to_string());
        let said = said.unwrap_or_else(|| "a picture was taken without memory".into());
        ensure(said.contains(why), said)
    };
    // A compositor that does not import dma-bufs, and a viewer that cannot read this one.
    let weston = compositor::weston(assets, "pixman")?;
    let viewer = weston.viewer(&assets.fanlight, &guest.path("api"))?;
    let in_window = |number: u32| {
        let shown = weston.wait_for(&picture(number));
        shown.map_err(|error| Failure::new(error, viewer.said()))
    };
    in_window(2)?;
    // First the guest's drivers withdraw the memory from the GPU; then memory decoding goes off without their
    // knowledge.
    for (way, why) in [("memory", "shows nothing"), ("force", "that is off")] {
        does(&mut guest, &format!("{way} off"))?;
        let error = heard(false)?.unwrap_or_default();
        let told = way == "memory" || error.contains(why);
        ensure(told, format!("{way}: {error:?}"))?;
        refused(&mut client, why)?;
        ensure(
            reader.page(&first, 0).is_err(),
            "a device can still read the memory",
        )?;
        does(&mut guest, &format!("{way} on"))?;
        let error = heard(true)?;
        ensure(error.is_none(), format!("{way}: {error:?}"))?;
        shows(&mut client, 2)?;
        read_by_device(&reader, &export(&mut client, PixelLocation::Device)?, 2)?;
    }
    // Both functions at once, through the port above the device.
    does(&mut guest, "reset")?;
    heard(true)?;
    does(&mut guest, "draw 3")?;
    shows(&mut client, 3)?;
    in_window(3)?;
    read_by_device(&reader, &export(&mut client, PixelLocation::Device)?, 3)?;
    guest.send("end\n")?;
    guest.expect_exit(0)
}

/// Buffers as GPU drivers have them: in many ranges, moved while on screen, and in memory that no dma-buf can cover.
fn buffers(assets: &Assets) -> Result<()> {
    let edu = whole_function(assets, edu::IDS)?;
    let memory = whole_function(assets, edu::MEMORY_IDS)?;
    let display = whole_function(assets, BOCHS_IDS)?;
    let script = "insmod /vram.ko; guest-agent show-buffers";
    let (mut guest, mut client) = guest(assets, script, &[&memory, &display])?;
    let reader = DmaReader::open(&edu)?;
    let ids = edu::MEMORY_IDS;
    let scattered = format!("pages,{ids},2,100000,3000,12c");
    does(&mut guest, &format!("show 1 {scattered}"))?;
    shows(&mut client, 1)?;
    let dmabuf = export(&mut client, PixelLocation::Device)?;
    ensure(
        exporter(&dmabuf)?.contains("vfio"),
        "the dma-buf is not from VFIO",
    )?;
    does(&mut guest, "where")?;
    let said = guest.transcript();
    // The distance counts up to the switch and down again, so the guest's reachability check does not depend on its
    // CPU.
    let reached = "agent: 300 ranges in BARs at distance 4\n";
    ensure(said.contains(reached), said)?;

    // The bytes stay the same at each move, and subscribers get a dma-buf of the new place.
    let watch = SubscribeDisplay::default();
    let (_, fds) = client
        .call_with::<DisplaySubscribe>(&watch, &[])
        .context("display.subscribe")?;
    let mut stream = MessageStream::new(UnixStream::from(one(fds)?)).context("a stream")?;
    let mut heard = |wanted: PixelLocation| {
        wait_for(&mut stream, |news, _| match news {
            DisplayUpdate::Scanout {
                output: 0,
                frame: Some(picture),
                ..
            } if picture.location == wanted => Some(()),
            _ => None,
        })
    };
    heard(PixelLocation::Device)?;
    let whole = format!("bar,{ids},2,2000000,{SIZE:x}");
    let ram = format!("ram,{SIZE:x}");
    does(&mut guest, &format!("move {ram}"))?;
    heard(PixelLocation::GuestRam)?;
    shows(&mut client, 1)?;
    let dmabuf = export(&mut client, PixelLocation::GuestRam)?;
    ensure(exporter(&dmabuf)?.contains("udmabuf"), "no udmabuf")?;
    does(&mut guest, &format!("move {whole}"))?;
    heard(PixelLocation::Device)?;
    shows(&mut client, 1)?;
    let dmabuf = export(&mut client, PixelLocation::Device)?;
    read_by_device(&reader, &dmabuf, 1)?;
    does(&mut guest, "draw 2")?;
    shows(&mut client, 2)?;
    read_by_device(&reader, &dmabuf, 2)?;
    does(&mut guest, &format!("move {scattered}"))?;
    shows(&mut client, 2)?;
    does(&mut guest, &format!("move {ram}"))?;
    heard(PixelLocation::GuestRam)?;
    shows(&mut client, 2)?;

    // Buffers that no dma-buf can cover are refused; the message names the entry and the reason.
    let most = SIZE - PAGE;
    let bar = format!("bar,{ids},2,0,{most:x}");
    for (ranges, why) in [
        (
            format!("ram,1000 {bar}"),
            "BAR 2 of passed-through device 0, and what is before it in the guest's RAM",
        ),
        (
            format!("bar,{BOCHS_IDS},2,0,1000 bar,{BOCHS_IDS},0,800000,{most:x}"),
            "BAR 0 of passed-through device 1, and what is before it in BAR 2 of passed-through device 1",
        ),
        (
            format!("bar,{BOCHS_IDS},0,800000,1000 {bar}"),
            "BAR 2 of passed-through device 0, and what is before it in BAR 0 of passed-through device 1",
        ),
        (
            format!("{bar} raw,f000000000,1000"),
            "nothing lies at guest-physical address 0xf000000000",
        ),
        (
            format!("{bar} raw,fec00000,1000"),
            "guest-physical address 0xfec00000",
        ),
    ] {
        does(&mut guest, &format!("show 0 {ranges}"))?;
        guest.wait_for(why)?;
        ensure(
            take_picture(&mut client).is_err(),
            "a picture was taken of a refused buffer",
        )?;
    }
    // The driver continues to work.
    does(&mut guest, &format!("show 3 {whole}"))?;
    shows(&mut client, 3)?;
    guest.send("end\n")?;
    guest.expect_exit(0)
}
