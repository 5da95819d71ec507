//! 3D by virglrenderer, with Mesa's software rasterizers on the host: stock Mesa in a guest, and programs that use the
//! guest driver directly.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use fanlight::renderer::sandbox;
use fanlight_api::{
    client::Client,
    display::{OutputIndex, Screenshot},
    methods::{GpuExportScanout, GpuScreenshot},
};
use fanlight_tests::{
    Context, Failure, Result,
    common::pci::Mmio,
    ensure,
    host_side::{
        compositor::read_png,
        display::Screen,
        guest::{Assets, Guest, GuestBuilder},
        test_case::TestCase,
    },
};
use rustix::process::{
    Pid, Resource, Rlimit, Signal, getppid, getrlimit, kill_process, setrlimit, test_kill_process,
};

use super::view::one;

pub const TESTS: &[TestCase] = &[
    TestCase::new("render::stock_mesa_draws_and_computes", mesa),
    TestCase::new("render::many_blobs_at_once", blobs),
    TestCase::new("render::a_slot_for_each_blob", slots),
    TestCase::new("render::an_older_virglrenderer", older),
    TestCase::new("render::the_machine_survives_its_renderer", killed),
];

/// A guest that does not draw for this long hangs; speed does not matter.
const PATIENCE: Duration = Duration::from_secs(120);

/// Descriptors that the renderer may open: it needs one for each blob.
const FILES: u64 = 1 << 16;

/// Prepares the root with Mesa: `mesa PROGRAM` runs programs in it, the agent included.
const ROOT: &str = "mount -t ext4 -o ro /dev/vda /mnt
    for dir in dev proc sys tmp; do mount -o bind /$dir /mnt/$dir; done
    cp /bin/guest-agent /tmp/agent
    export LD_LIBRARY_PATH=/usr/lib/x86_64-linux-gnu XDG_RUNTIME_DIR=/tmp
    export VK_DRIVER_FILES=/usr/share/vulkan/icd.d/virtio_icd.json
    mesa() { chroot /mnt \"$@\"; }
";

fn guest(assets: &Assets, gpu: &str, script: &str) -> Result<GuestBuilder> {
    plain_guest(assets, gpu, script)?
        .modules(&["ext4"])?
        .with_graphics()
}

fn plain_guest(assets: &Assets, gpu: &str, script: &str) -> Result<GuestBuilder> {
    let guest = assets.guest(script).modules(&["virtio_gpu"])?;
    Ok(guest.option("--memory", "1G").option("--gpu", gpu))
}

/// Starts a guest, waits for each expected text, then for its power-off. Returns the transcript.
fn run(guest: GuestBuilder, says: &[&str]) -> Result<String> {
    let mut guest = guest.start()?;
    for text in says {
        guest.wait_for(text)?;
    }
    guest.expect_exit(0)?;
    Ok(guest.transcript())
}

fn mesa(assets: &Assets) -> Result<()> {
    let script = format!(
        "{ROOT}
        dmesg | grep -E 'virtio_gpu|drm' | sed 's/^/dmesg: /'
        mesa /usr/bin/vulkaninfo --summary 2>&1 | sed 's/^/vulkan: /'; echo listed Vulkan
        mesa /usr/bin/eglinfo.x86_64-linux-gnu -B -p surfaceless 2>&1 | sed 's/^/egl: /'; echo listed EGL
        mesa /tmp/agent gl 2>&1 | sed 's/^/gl: /'; echo drew
        mesa /tmp/agent vulkan 2>&1 | sed 's/^/vk: /'"
    );
    let guest = guest(assets, "outputs=640x480,renderer=venus+virgl", &script)?;
    let said = run(guest, &["listed Vulkan", "listed EGL", "drew"])?;
    let line = |start: &str, part: &str| {
        let found = said
            .lines()
            .any(|line| line.starts_with(start) && line.contains(part));
        ensure(
            found,
            format!("no line {start:?} with {part:?} in:\n{said}"),
        )
    };
    line("dmesg: ", "+virgl +edid +resource_blob +host_visible")?;
    line("dmesg: ", "number of cap sets: 3")?;
    line("vulkan: ", "Virtio-GPU Venus")?;
    line("egl: ", "virgl")?;
    line("gl: ", "agent: drawn by virgl")?;
    line("vk: ", "agent: computed and drawn by Virtio-GPU Venus")
}

/// Tens of thousands of blobs: mapped at once, and mapped and unmapped in pairs meanwhile.
const BLOBS: u32 = 2;
const PAIRS: u32 = 3;

/// With Linux's driver, and with a test program that need not create a blob for each mapping.
fn blobs(assets: &Assets) -> Result<()> {
    let files = getrlimit(Resource::Nofile);
    if files.maximum.is_some_and(|most| most < FILES) {
        let files = Rlimit {
            current: files.current,
            maximum: Some(FILES),
        };
        setrlimit(Resource::Nofile, files).context("cannot raise the limit of open files")?;
    }
    let script = format!(
        "/bin/guest-agent outlive
        /bin/guest-agent blobs 2000 100; /bin/guest-agent blobs 2000 10
        echo complaints: $(dmesg | grep -ciE 'virtio_gpu.*(ERROR|response)|\\[drm.*ERROR')
        echo 0 > /sys/class/vtconsole/vtcon1/bind
        pci=$(basename $(readlink -f /sys/class/drm/card0/device))
        echo $pci > /sys/bus/pci/drivers/virtio-pci/unbind
        /bin/guest-agent raw-blobs {BLOBS}0000 {PAIRS}0000 || {{ echo ended by $?; dmesg | tail -n 20; }}"
    );
    let gpu = "outputs=640x480,renderer=venus,hostmem=256M";
    let guest = guest(assets, gpu, &script)?;
    let mut says = vec!["agent: a blob outlived its context".to_owned()];
    says.extend([100, 10].map(|pairs| format!("agent: 2000 blobs and {pairs} pairs")));
    // Each step has its own time limit: a guest that is silent for minutes counts as hanging.
    let steps = |what: &'static str, most: u32| {
        (1..=most).map(move |step| format!("agent: {step}0000 {what}"))
    };
    says.extend(steps("shown", BLOBS));
    says.extend(steps("pairs", PAIRS));
    says.push(format!("agent: {BLOBS}0000 intact"));
    says.extend(steps("taken away", BLOBS));
    says.extend(steps("let go", BLOBS));
    says.push(format!(
        "agent: {BLOBS}0000 blobs at once and {PAIRS}0000 pairs"
    ));
    let says: Vec<_> = says.iter().map(String::as_str).collect();
    let said = run(guest, &says)?;
    ensure(said.contains("complaints: 0"), &said)
}

fn slots(assets: &Assets) -> Result<()> {
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let path = dir.path().to_path_buf();
    thread::spawn(move || confined(&path))
        .join()
        .unwrap_or_else(|_| Err(Failure("it panicked".into())))?;
    let gpu = "outputs=640x480,renderer=venus,hostmem=64M,hostmem-slots=on";
    let guest = guest(assets, gpu, "/bin/guest-agent blobs 200 20")?;
    run(guest, &["agent: 200 blobs and 20 pairs"]).map(drop)
}

/// virglrenderer 1.1 on the host: OpenGL and Vulkan by the guest's stock Mesa, and blobs. This version cannot map blobs
/// at an address that Fanlight chooses.
fn older(assets: &Assets) -> Result<()> {
    let script = format!(
        "{ROOT}
        mesa /tmp/agent gl 2>&1 | sed 's/^/gl: /'; echo drew
        mesa /tmp/agent vulkan 2>&1 | sed 's/^/vk: /'
        /bin/guest-agent blobs 200 20"
    );
    let guest = plain_guest(assets, "outputs=640x480,renderer=venus+virgl", &script)?;
    let guest = guest
        .modules(&["ext4"])?
        .with_graphics_of(assets.older_graphics.clone())?;
    let says = [
        "gl: agent: drawn by virgl",
        "vk: agent: computed and drawn by Virtio-GPU Venus",
        "agent: 200 blobs and 20 pairs",
    ];
    run(guest, &says).map(drop)
}

/// File access in the renderer's sandbox, tried on a thread of this process: the kernel has Landlock.
fn confined(dir: &Path) -> Result<()> {
    let own = dir.join("secret");
    fs::write(&own, "secret").context("cannot write a file")?;
    sandbox::enter().context("cannot confine a thread")?;
    let refused = |what: &str, result: std::io::Result<()>| {
        let refused = result.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied);
        ensure(refused, format!("{what} is not refused"))
    };
    refused("reading a user's file", fs::read(&own).map(drop))?;
    refused("writing it", fs::write(&own, ""))?;
    refused("making one", fs::write(dir.join("new"), ""))?;
    refused(
        "listing devices that are not GPUs",
        fs::read("/dev/console").map(drop),
    )?;
    let parent = getppid().ok_or(Failure("no parent".into()))?;
    refused(
        "a signal to another program",
        test_kill_process(parent).map_err(Into::into),
    )?;
    fs::read("/proc/self/maps").context("cannot read /proc")?;
    fs::write("/dev/null", "x").context("cannot write to /dev/null")
}

/// The renderer process of a guest.
fn renderer(guest: &Guest) -> Result<Pid> {
    let parent = format!("PPid:\t{}\n", guest.pid());
    let processes = fs::read_dir("/proc").context("cannot look for processes")?;
    let names = processes
        .flatten()
        .map(|process| process.file_name().to_string_lossy().into_owned());
    let mut numbers = names.filter_map(|name| name.parse::<i32>().ok());
    let found = numbers.find(|number| {
        let read = |file: &str| fs::read_to_string(format!("/proc/{number}/{file}"));
        read("status").is_ok_and(|status| status.contains(&parent))
            && read("cmdline").is_ok_and(|command| command.contains("\0renderer\0"))
    });
    found
        .and_then(Pid::from_raw)
        .ok_or(Failure("there is no renderer".into()))
}

/// After the renderer is killed, the machine, the display and a second GPU without a renderer still work.
fn killed(assets: &Assets) -> Result<()> {
    let guest = guest(
        assets,
        "outputs=640x480,renderer=venus+virgl",
        "dmesg | grep -o '[+-]virgl' | sed 's/^/GPU: /'
        sleep 1000 | CARD=1 /bin/guest-agent draw 800 600 250 3399cc & read -r line
        echo 0 > /sys/class/graphics/fbcon/cursor_blink
        /bin/guest-agent show-blob
        /bin/guest-agent show-red
        /bin/guest-agent blobs-until-refused
        head -c 1228800 /dev/zero | tr '\\0' '\\125' > /dev/fb0; echo pain''ted; read -r line
        echo 0 > /sys/class/vtconsole/vtcon1/bind; cd /sys/bus/virtio/drivers/virtio_gpu
        d=$(ls -d virtio* | head -n 1); echo $d > unbind; echo $d > bind
        /bin/guest-agent blobs 20 20",
    )?;
    let socket: PathBuf = guest.path("api");
    let mut guest = guest
        .option("--gpu", "outputs=800x600")
        .option("--api-socket", &socket)
        .start()?;
    guest.wait_for("agent: shows")?;
    let said = guest.transcript();
    let has: Vec<_> = said
        .lines()
        .filter_map(|line| line.trim().strip_prefix("GPU: "))
        .collect();
    ensure(has == ["+virgl", "-virgl"], &said)?;
    let mut second = Screen::of_gpu(&socket, 1)?;
    second.wait_for(0, (800, 600), |_, _| [0x33, 0x99, 0xcc])?;
    // `draw` opened the first GPU too while it searched, and only one program at a time may set a GPU's mode.
    // So the next program starts only now.
    guest.send("\n")?;
    guest.wait_for("agent: showing 640x480")?;
    let mut client = Client::connect(&socket).context("cannot connect")?;
    let mut picture = || -> Result<Vec<u8>> {
        let (_, fds) = client
            .call_with::<GpuScreenshot>(&Screenshot::default(), &[])
            .context("gpu.screenshot")?;
        read_png(one(fds)?.into())
    };
    let mut shows = |colour: [u8; 3]| -> Result<()> {
        // The guest's driver does not wait for the device.
        let start = Instant::now();
        loop {
            let seen = picture()?;
            if seen.len() == 640 * 480 * 3 && seen.chunks(3).all(|pixel| pixel == colour) {
                return Ok(());
            }
            let late = format!("it is not {colour:?} but {:?}", seen.get(..6));
            ensure(start.elapsed() < PATIENCE, late)?;
            thread::sleep(Duration::from_millis(100));
        }
    };
    shows([0, 0xc0, 0])?;
    guest.send("\n")?;
    guest.wait_for_times("agent: showing 640x480", 2)?;
    shows([255, 0, 0])?;
    // The output shows the texture's own memory, so new pixels appear before any update is sent.
    let mut other = Client::connect(&socket).context("cannot connect")?;
    let (exported, fds) = other
        .call_with::<GpuExportScanout>(&OutputIndex::default(), &[])
        .context("gpu.export_scanout")?;
    ensure(exported.offset == 0, format!("{exported:?}"))?;
    let texture = Mmio::new(&one(fds)?.into(), 0, 4096).context("cannot map a texture")?;
    guest.send("\n")?;
    guest.wait_for("agent: drawn again")?;
    let pixel = texture.read::<u32>(0).to_le_bytes();
    ensure(pixel[..3] == [0, 255, 0], format!("{pixel:?}"))?;
    drop(texture);
    guest.send("\n")?;
    guest.wait_for("agent: going on")?;
    let renderer = renderer(&guest)?;
    let status = fs::read_to_string(format!("/proc/{}/status", renderer.as_raw_pid()));
    let status = status.context("cannot look at the renderer")?;
    for line in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000"] {
        ensure(status.contains(line), format!("no {line:?} in:\n{status}"))?;
    }
    kill_process(renderer, Signal::KILL).context("cannot kill the renderer")?;
    guest.wait_for("agent: refused after some")?;
    guest.wait_for("painted")?;
    shows([0x55; 3])?;
    second.wait_for(0, (800, 600), |_, _| [0x33, 0x99, 0xcc])?;
    guest.send("\n")?;
    guest.wait_for("agent: 20 blobs and 20 pairs")?;
    guest.expect_exit(0)
}
