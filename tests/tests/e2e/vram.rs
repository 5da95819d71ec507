//! The heart: a guest draws into memory of a passed-through device and shows it through its stock GPU driver; on
//! the host a picture has those pixels, and the dma-buf of it is that memory, as another device sees it.

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

/// The same, and a display whose memory is shown.
const PEERS_AND_DISPLAY: &[L1Device] =
    &[L1Device::Edu, L1Device::Ivshmem(64), L1Device::BochsDisplay];

pub const TESTS: &[TestCase] = &[
    TestCase::new("vram::a_bar_is_shown_and_read", shown).devices(PEERS),
    TestCase::new("vram::buffers_scatter_move_and_are_refused", buffers).devices(PEERS_AND_DISPLAY),
];

/// Vendor and device id of bochs-display, whose BAR 0 is memory.
const BOCHS_IDS: &str = "1234:1111";

/// A guest whose own vfio-pci needs no IOMMU, and which has the module that exports buffers. It has the kernel of
/// the nested host, since Debian's is built without the first.
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

/// Has the guest's agent do what a line says.
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

/// Who made a dma-buf.
fn exporter(dmabuf: &OwnedFd) -> Result<String> {
    let path = Path::new("/proc/self/fdinfo").join(dmabuf.as_raw_fd().to_string());
    let text = std::fs::read_to_string(path).context("cannot look at a descriptor")?;
    let name = text.lines().find_map(|line| line.strip_prefix("exp_name:"));
    name.map(|name| name.trim().to_owned())
        .ok_or_else(|| Failure(format!("no dma-buf: {text}")))
}

/// Has a device read the first, a middle and the last page of a picture, which must be of this number.
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
            format!("the device read other pixels in page {page} of picture {number}"),
        )?;
    }
    Ok(())
}

fn shows(client: &mut Client, number: u32) -> Result<()> {
    // The guest's driver waits 50 ms at most for what it tells the device.
    let start = Instant::now();
    while !take_picture(client).is_ok_and(|seen| seen == picture(number)) {
        let late = format!("the screenshot is not picture {number}");
        ensure(start.elapsed() < PATIENCE, late)?;
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// So much of a device's memory takes what [`shown_from`] draws.
pub const ROOM: u64 = SIZE;

/// A guest draws at `offset` of BAR `bar` of the function at `address` and shows it: a picture and a dma-buf are of that
/// memory, there is neither while it is off, and both are there again after that and after a reset.
pub fn shown_from(assets: &Assets, address: &str, ids: &str, bar: u32, offset: u64) -> Result<()> {
    let script = format!("guest-agent show-bar {ids} {bar} {offset}");
    let (mut guest, mut client) = guest(assets, &script, &[&format!("{address},port=1")])?;
    shows(&mut client, 1)?;
    does(&mut guest, "draw 2")?;
    shows(&mut client, 2)?;
    for way in ["memory", "force"] {
        does(&mut guest, &format!("{way} off"))?;
        ensure(take_picture(&mut client).is_err(), "there is a picture")?;
        does(&mut guest, &format!("{way} on"))?;
        shows(&mut client, 2)?;
    }
    does(&mut guest, "reset")?;
    does(&mut guest, "draw 3")?;
    shows(&mut client, 3)?;
    let by = exporter(&export(&mut client, PixelLocation::Device)?)?;
    ensure(by.contains("vfio"), format!("a dma-buf of {by}"))?;
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
    ensure(by.contains("vfio"), format!("a dma-buf of {by}"))?;
    read_by_device(&reader, &first, 1)?;
    // Nothing is copied anywhere: what is drawn next is there.
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
        let said = said.unwrap_or_else(|| "there is a picture".into());
        ensure(said.contains(why), said)
    };
    // A compositor that does not import, and a viewer that cannot read the dma-buf.
    let weston = compositor::weston(assets, "pixman")?;
    let viewer = weston.viewer(&assets.fanlight, &guest.path("api"))?;
    let in_window = |number: u32| {
        let shown = weston.wait_for(&picture(number));
        shown.map_err(|error| Failure::new(error, viewer.said()))
    };
    in_window(2)?;
    // The guest's drivers take the memory from the GPU first; then it is switched off behind their backs.
    for (way, why) in [("memory", "shows nothing"), ("force", "that is off")] {
        does(&mut guest, &format!("{way} off"))?;
        let error = heard(false)?.unwrap_or_default();
        let told = way == "memory" || error.contains(why);
        ensure(told, format!("{way}: {error:?}"))?;
        refused(&mut client, why)?;
        ensure(reader.page(&first, 0).is_err(), "a device still reads")?;
        does(&mut guest, &format!("{way} on"))?;
        let error = heard(true)?;
        ensure(error.is_none(), format!("{way}: {error:?}"))?;
        shows(&mut client, 2)?;
        read_by_device(&reader, &export(&mut client, PixelLocation::Device)?, 2)?;
    }
    // Both at once, by the port that the device is behind.
    does(&mut guest, "reset")?;
    heard(true)?;
    does(&mut guest, "draw 3")?;
    shows(&mut client, 3)?;
    in_window(3)?;
    read_by_device(&reader, &export(&mut client, PixelLocation::Device)?, 3)?;
    guest.send("end\n")?;
    guest.expect_exit(0)
}

/// Buffers as a GPU's driver has them: in many ranges, moved while they are on screen, and where nobody can have
/// them.
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
    ensure(exporter(&dmabuf)?.contains("vfio"), "no dma-buf of VFIO's")?;
    does(&mut guest, "where")?;
    let said = guest.transcript();
    // Up to the switch, and down again: the guest's check of whether the GPU reaches the memory does not depend on its
    // processor.
    let reached = "agent: 300 ranges in BARs at distance 4\n";
    ensure(said.contains(reached), said)?;

    // Each time the bytes are the same, and those who watch get the memory where they are now.
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

    // What no dma-buf can be is refused, and the message says which entry it is and why.
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
        ensure(take_picture(&mut client).is_err(), "there is a picture")?;
    }
    // And the driver goes on.
    does(&mut guest, &format!("show 3 {whole}"))?;
    shows(&mut client, 3)?;
    guest.send("end\n")?;
    guest.expect_exit(0)
}
