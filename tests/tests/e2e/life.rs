//! Machines end and restart with the documented exit statuses.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use fanlight_tests::{
    Context, Failure, Result, ensure,
    host_side::{
        display::Screen,
        guest::{Assets, Guest, PRESSED, make_image, nested_host_clock},
        test_case::TestCase,
        tiny_kernel::tiny_kernel,
    },
    value,
};
use rustix::process::Signal;

use super::drm::{FLIP, MODETEST, flipping};

pub const TESTS: &[TestCase] = &[
    TestCase::new("life::power_off_is_status_0", power_off),
    TestCase::new("life::a_reset_restarts_in_place", reset_in_place),
    TestCase::new("life::a_reset_clears_memory", ram_is_cleared),
    TestCase::new("life::a_reset_can_end", reset_exits),
    TestCase::new("life::a_triple_fault_is_a_reset", triple_fault),
    TestCase::new("life::a_panic_has_its_status", panic),
    TestCase::new("life::a_panic_can_restart", panic_restarts),
    TestCase::new("life::a_panic_can_be_left_to_the_guest", panic_continues),
    TestCase::new("life::signals_press_the_power_button", signals),
    TestCase::new("life::a_second_sigterm_stops", second_sigterm),
    TestCase::new("life::a_second_sigterm_stops_a_later_life", reboots_instead),
    TestCase::new("life::a_guest_that_ignores_the_button_is_stopped", ignores),
    TestCase::new("life::a_guest_that_cannot_start_ends", cannot_start),
    TestCase::new("life::kexec_takes_the_devices_over", kexec),
];

fn power_off(assets: &Assets) -> Result<()> {
    assets.guest("").run().map(drop)
}

/// Restarts once, and waits for a line in each life. A mark on the disk distinguishes the second life from the first.
const TWO_LIVES: &str = "echo life; read -r go; mark=$(dd if=/dev/vda bs=4 count=1 2>/dev/null)
    if [ \"$mark\" != seen ]; then
        printf seen | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null; reboot -f; sleep 100
    fi
    echo second; echo rng: $(dd if=/dev/hwrng bs=16 count=1 2>/dev/null | wc -c)";

fn reset_in_place(assets: &Assets) -> Result<()> {
    let guest = assets.guest(TWO_LIVES);
    let image = guest.path("disk");
    make_image(assets, &image, "raw", "1M")?;
    let mut guest = guest
        .option("--disk", format!("path={}", image.display()))
        .option("--cpus", "2")
        .start()?;
    guest.wait_for("life")?;
    let before = open_files(guest.pid())?;
    guest.send("\n")?;
    guest.wait_for_times("life", 2)?;
    let after = open_files(guest.pid())?;
    guest.send("\n")?;
    ensure(before == after, format!("{before:#?} became {after:#?}"))?;
    guest.expect_exit(0)?;
    let said = guest.transcript();
    ensure(said.contains("second") && said.contains("rng: 16"), &said)
}

/// The open files of a process, sorted, without the numbers that differ from one life to the next.
fn open_files(pid: u32) -> Result<Vec<String>> {
    let dir = fs::read_dir(format!("/proc/{pid}/fd")).context("cannot list descriptors")?;
    let mut files: Vec<_> = dir
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|link| {
            link.to_string_lossy()
                .replace(|digit: char| digit.is_ascii_digit(), "")
        })
        .collect();
    files.sort();
    Ok(files)
}

/// What the first life leaves in RAM, the second must not find. The script's text does not match itself.
fn ram_is_cleared(assets: &Assets) -> Result<()> {
    const PAGES: usize = 4096;
    let guest = assets.guest(
        "mark=$(dd if=/dev/vda bs=4 count=1 2>/dev/null)
        if [ \"$mark\" != seen ]; then
            mount -t tmpfs tmpfs /mnt; yes left''-over | head -c 16777216 > /mnt/x
            printf seen | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null
            echo filled; read -r go; reboot -f; sleep 100
        fi
        echo second; read -r go",
    );
    let image = guest.path("disk");
    make_image(assets, &image, "raw", "1M")?;
    let mut guest = guest
        .option("--disk", format!("path={}", image.display()))
        .option("--memory", "128M")
        .start()?;
    guest.wait_for("filled")?;
    let filled = pages_left_over(guest.pid())?;
    ensure(filled >= PAGES, format!("{filled} pages are filled"))?;
    guest.send("\n")?;
    guest.wait_for("second")?;
    let left = pages_left_over(guest.pid())?;
    ensure(left == 0, format!("{left} pages are left over"))?;
    guest.send("\n")?;
    guest.expect_exit(0)
}

/// Pages of guest RAM that begin with what the first life wrote.
fn pages_left_over(pid: u32) -> Result<usize> {
    const PAGE: usize = 4096;
    let mark = b"left-over";
    let dir = fs::read_dir(format!("/proc/{pid}/fd")).context("cannot list descriptors")?;
    let is_ram = |path: &Path| {
        fs::read_link(path).is_ok_and(|link| link.to_string_lossy().contains("memfd:fanlight-ram"))
    };
    let ram = dir
        .flatten()
        .map(|entry| entry.path())
        .find(|path| is_ram(path));
    let ram = ram.ok_or_else(|| Failure("there is no file of guest RAM".into()))?;
    let ram = File::open(ram).context("cannot open guest RAM")?;
    let size = ram.metadata().context("cannot ask for its size")?.len();
    let mut found = 0;
    for at in (0..size).step_by(PAGE) {
        let mut start = [0; 32];
        ram.read_exact_at(&mut start, at)
            .context("cannot read guest RAM")?;
        found += usize::from(start.windows(mark.len()).any(|part| part == mark));
    }
    Ok(found)
}

fn reset_exits(assets: &Assets) -> Result<()> {
    let mut guest = assets
        .guest("reboot -f; sleep 100")
        .option("--on-reset", "exit")
        .start()?;
    guest.expect_exit(32)
}

fn triple_fault(assets: &Assets) -> Result<()> {
    let mut guest = assets
        .guest("reboot -f; sleep 100")
        .cmdline("reboot=t")
        .option("--on-reset", "exit")
        .start()?;
    guest.expect_exit(32)
}

fn panic(assets: &Assets) -> Result<()> {
    let mut guest = assets.guest("echo c > /proc/sysrq-trigger").start()?;
    guest.expect_exit(33)?;
    // Linux prints this after it has notified pvpanic.
    let said = guest.transcript();
    ensure(said.contains("Kernel Offset"), said)
}

fn panic_restarts(assets: &Assets) -> Result<()> {
    let guest = assets.guest(
        "mark=$(dd if=/dev/vda bs=4 count=1 2>/dev/null); [ \"$mark\" = seen ] && exit
        printf seen | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null
        echo c > /proc/sysrq-trigger",
    );
    let image = guest.path("disk");
    make_image(assets, &image, "raw", "1M")?;
    let mut guest = guest
        .option("--disk", format!("path={}", image.display()))
        .option("--on-panic", "restart")
        .start()?;
    guest.expect_exit(0)?;
    let said = guest.transcript();
    let lives = said.matches("fanlight-init: up").count();
    ensure(lives == 2 && said.contains("Kernel panic"), said)
}

/// The guest resets itself after its panic, and that decides.
fn panic_continues(assets: &Assets) -> Result<()> {
    let mut guest = assets
        .guest("echo c > /proc/sysrq-trigger")
        .option("--on-panic", "continue")
        .option("--on-reset", "exit")
        .start()?;
    guest.expect_exit(32)?;
    let said = guest.transcript();
    ensure(said.contains("Kernel panic"), said)
}

fn signals(assets: &Assets) -> Result<()> {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut guest = assets.guest(PRESSED).start()?;
        guest.wait_for("ready")?;
        guest.signal(signal)?;
        guest.wait_for("pressed")?;
        guest.expect_exit(0)?;
    }
    Ok(())
}

fn second_sigterm(assets: &Assets) -> Result<()> {
    let mut guest = assets.guest("echo ready; sleep 1000").start()?;
    guest.wait_for("ready")?;
    guest.signal(Signal::TERM)?;
    std::thread::sleep(Duration::from_millis(500));
    guest.signal(Signal::TERM)?;
    guest.expect_exit(34)?;
    let said = guest.transcript();
    ensure(!said.contains("did not shut down"), said)
}

/// A guest that restarts when it is asked to shut down.
fn reboots_instead(assets: &Assets) -> Result<()> {
    let script = format!("{PRESSED}; reboot -f; sleep 100");
    let mut guest = assets.guest(&script).start()?;
    guest.wait_for("ready")?;
    guest.signal(Signal::TERM)?;
    guest.wait_for_times("fanlight-init: up", 2)?;
    guest.signal(Signal::TERM)?;
    guest.expect_exit(34)?;
    let said = guest.transcript();
    ensure(!said.contains("fanlight-init: done"), &said)?;
    ensure(!said.contains("did not shut down"), said)
}

/// A signal, and then nothing: the guest has half a minute.
fn ignores(assets: &Assets) -> Result<()> {
    let mut guest = assets.guest("echo ready; sleep 1000").start()?;
    guest.wait_for("ready")?;
    let asked = Instant::now();
    guest.signal(Signal::TERM)?;
    guest.expect_exit(34)?;
    let (patience, said) = (asked.elapsed(), guest.transcript());
    ensure(
        patience >= Duration::from_secs(29),
        format!("{patience:?}: {said}"),
    )?;
    ensure(said.contains("did not shut down"), said)
}

/// UD2, an undefined instruction: without an IDT, a triple fault.
const UNDEFINED: [u8; 4] = [0x0f, 0x0b, 0, 0];

fn cannot_start(assets: &Assets) -> Result<()> {
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let kernel = dir.path().join("kernel");
    fs::write(&kernel, tiny_kernel(UNDEFINED)).context("cannot write a kernel")?;
    let mut command = Command::new(&assets.fanlight);
    command
        .args(["run", "--memory", "64M", "--kernel"])
        .arg(&kernel);
    let mut guest = Guest::spawn(command, dir)?;
    guest.expect_exit(1)?;
    let said = guest.transcript();
    ensure(said.contains("restarted 5 times"), said)
}

/// A second kernel finds devices in the state in which the first one's drivers left them, the GPU in mid-frame.
fn kexec(assets: &Assets) -> Result<()> {
    let drawing = |script: &str| {
        assets
            .guest(script)
            .modules(&["virtio_gpu"])?
            .graphics_tool(MODETEST)
    };
    let second = drawing(&format!(
        "echo second: $(cat /proc/cmdline)
         dd if=/dev/vda bs=1M count=8 2>/dev/null | md5sum | sed 's/^/read: /'
         echo rng: $(dd if=/dev/hwrng bs=16 count=1 2>/dev/null | wc -c)
         {FLIP}400x304 -v 2>/tmp/flips &
         read -r end"
    ))?;
    let first = drawing(&format!(
        "dd if=/dev/urandom of=/dev/vda bs=1M count=8 conv=fsync 2>/dev/null
         dd if=/dev/vda bs=1M count=8 2>/dev/null | md5sum | sed 's/^/written: /'
         {FLIP}320x240 -v 2>/tmp/flips &
         echo ready; read -r go
         guest-agent kexec /vmlinuz /second.cpio 'console=ttyS0 panic=-1 loglevel=4{} again'",
        nested_host_clock()
    ))?
    .file(
        "vmlinuz",
        &fs::read(&assets.stock.image).context("cannot read the kernel")?,
    )
    .file("second.cpio", &second.initrd()?);
    let (image, socket) = (first.path("disk"), first.path("api"));
    make_image(assets, &image, "raw", "16M")?;
    let mut guest = first
        .option("--disk", format!("path={}", image.display()))
        .option("--gpu", "outputs=320x240")
        .option("--api-socket", &socket)
        .option("--memory", "768M")
        .start()?;
    guest.wait_for("ready")?;
    let mut screen = Screen::connect(&socket)?;
    flipping(&mut screen, (320, 240))?;
    screen.set_output(0, Some("400x304"))?;
    guest.send("go\n")?;
    guest.wait_for("second:")?;
    flipping(&mut screen, (400, 304))?;
    guest.send("end\n")?;
    guest.expect_exit(0)?;
    let said = guest.transcript();
    ensure(value(&said, "second:")?.ends_with("again"), &said)?;
    ensure(value(&said, "read:")? == value(&said, "written:")?, &said)?;
    ensure(value(&said, "rng:")? == "16", &said)
}
