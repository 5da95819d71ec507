//! Machines end and restart with the documented exit statuses.

use std::time::Duration;

use fanlight_tests::{
    Context, Result, ensure,
    host_side::{
        display::Screen,
        guest::{Assets, PRESSED, make_image, nested_host_clock},
        test_case::TestCase,
    },
    value,
};
use rustix::process::Signal;

use super::drm::{FLIP, MODETEST, flipping};

pub const TESTS: &[TestCase] = &[
    TestCase::new("life::power_off_is_status_0", power_off),
    TestCase::new("life::a_reset_restarts_in_place", reset_in_place),
    TestCase::new("life::a_reset_can_end", reset_exits),
    TestCase::new("life::a_triple_fault_is_a_reset", triple_fault),
    TestCase::new("life::a_panic_has_its_status", panic),
    TestCase::new("life::sigterm_presses_the_power_button", sigterm),
    TestCase::new("life::a_second_sigterm_stops", second_sigterm),
    TestCase::new("life::kexec_takes_the_devices_over", kexec),
];

fn power_off(assets: &Assets) -> Result<()> {
    assets.guest("").run().map(drop)
}

/// Restarts once. A mark on the disk distinguishes the second life from the first.
const TWO_LIVES: &str = "echo life; mark=$(dd if=/dev/vda bs=4 count=1 2>/dev/null)
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
    let pid = guest.pid();
    guest.wait_for_times("fanlight-init: up", 2)?;
    guest.expect_exit(0)?;
    let said = guest.transcript();
    ensure(said.contains("second") && said.contains("rng: 16"), &said)?;
    ensure(guest.pid() == pid, "another process")
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

fn sigterm(assets: &Assets) -> Result<()> {
    let mut guest = assets.guest(PRESSED).start()?;
    guest.wait_for("ready")?;
    guest.signal(Signal::TERM)?;
    guest.wait_for("pressed")?;
    guest.expect_exit(0)
}

fn second_sigterm(assets: &Assets) -> Result<()> {
    let mut guest = assets.guest("echo ready; sleep 1000").start()?;
    guest.wait_for("ready")?;
    guest.signal(Signal::TERM)?;
    std::thread::sleep(Duration::from_millis(500));
    guest.signal(Signal::TERM)?;
    guest.expect_exit(34)
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
        &std::fs::read(&assets.stock.image).context("cannot read the kernel")?,
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
