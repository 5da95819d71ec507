//! Devices at chosen addresses, and drivers that unbind and bind again.

use fanlight_tests::{
    Result,
    common::echo::{self, Address},
    ensure,
    host_side::{
        guest::{Assets, make_image},
        test_case::TestCase,
    },
    value,
};

use super::network::ip;

pub const TESTS: &[TestCase] = &[
    TestCase::new("topology::drivers_unbind_and_bind", rebind),
    TestCase::new("topology::no_entropy_device", no_entropy_device),
    TestCase::new("topology::a_disk_behind_a_root_port", behind_port),
    TestCase::new("topology::a_bar_that_moves", moved_bar),
];

/// Every virtio device loses its driver and gets it back, twice; then all devices work.
const REBIND: &str = "for round in 1 2; do for path in /sys/bus/pci/drivers/virtio-pci/0000:*; do
        device=${path##*/}
        echo $device > /sys/bus/pci/drivers/virtio-pci/unbind
        echo $device > /sys/bus/pci/drivers/virtio-pci/bind
    done; done
    echo drivers: $(ls -d /sys/bus/virtio/devices/*/driver | wc -l)
    echo disk: $(dd if=/dev/urandom of=/dev/vda bs=1M count=4 conv=fsync 2>/dev/null && echo ok)
    echo entropy: $(dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c)
    echo net: $(ls -d /sys/class/net/eth* | wc -l)
    echo console: $(ls /dev/hvc0)
    ip addr add 10.0.73.2/24 dev eth0; ip link set eth0 up; echo ready
    guest-agent call vsock:2:7000 1000; guest-agent call tcp:10.0.73.1:7000 1000";

fn rebind(assets: &Assets) -> Result<()> {
    let guest = assets.guest(REBIND);
    let image = guest.path("disk");
    make_image(assets, &image, "raw", "16M")?;
    let mut guest = guest
        .option("--disk", format!("path={}", image.display()))
        .option("--net", "tap=tapb")
        .option("--vsock", "cid=51")
        .option("--console", "null")
        .option("--cpus", "2")
        .start()?;
    guest.wait_for("ready")?;
    ip("addr add 10.0.73.1/24 dev tapb")?;
    ip("link set tapb up")?;
    let tcp = Address::Tcp("10.0.73.1:7000".into());
    for address in [Address::Vsock(u32::MAX, 7000), tcp] {
        let served = guest.converse(move || echo::serve(&address))?;
        ensure(served == 1000, format!("{served} bytes came"))?;
    }
    guest.expect_exit(0)?;
    let said = guest.transcript();
    ensure(said.matches("called with 1000 bytes").count() == 2, &said)?;
    ensure(value(&said, "drivers:")? == "5", &said)?;
    ensure(value(&said, "disk:")? == "ok", &said)?;
    ensure(value(&said, "entropy:")? == "64", &said)?;
    ensure(value(&said, "net:")? == "1", &said)?;
    ensure(value(&said, "console:")? == "/dev/hvc0", &said)
}

fn no_entropy_device(assets: &Assets) -> Result<()> {
    let script = "echo devices: $(cat /sys/bus/pci/devices/*/vendor | grep -c 0x1af4)
        echo entropy: $(cat /sys/class/misc/hw_random/rng_current)";
    let with = assets.guest(script).run()?;
    ensure(value(&with, "devices:")? == "1", &with)?;
    ensure(value(&with, "entropy:")?.starts_with("virtio_rng"), &with)?;
    let without = assets.guest(script).option("--rng", "off").run()?;
    ensure(value(&without, "devices:")? == "0", &without)
}

fn behind_port(assets: &Assets) -> Result<()> {
    let guest = assets.guest(
        "echo path: $(readlink -f /sys/block/vda/device)
         echo port: $(cat /sys/bus/pci/devices/0000:00:0*/class | grep -c 0x060400)
         dd if=/dev/urandom of=/dev/vda bs=1M count=2 conv=fsync 2>/dev/null && echo written",
    );
    let image = guest.path("disk");
    make_image(assets, &image, "raw", "16M")?;
    let said = guest
        .option("--disk", format!("path={},port=1", image.display()))
        .run()?;
    ensure(value(&said, "port:")? == "1", &said)?;
    ensure(value(&said, "path:")?.contains("/0000:01:00.0/"), &said)?;
    ensure(said.contains("written"), &said)
}

fn moved_bar(assets: &Assets) -> Result<()> {
    // An alignment coarser than Fanlight's makes the guest place the BARs anew.
    let run = |cmdline: &str| {
        let guest = assets
            .guest(
                "device=$(readlink -f /sys/block/vda/device/..)
                 echo bars: $(grep -v '^0x0* ' $device/resource)
                 dd if=/dev/urandom of=/dev/vda bs=1M count=2 conv=fsync 2>/dev/null && echo written",
            )
            .cmdline(cmdline);
        let image = guest.path("disk");
        make_image(assets, &image, "raw", "16M")?;
        guest
            .option("--disk", format!("path={}", image.display()))
            .run()
    };
    let placed = run("")?;
    let moved = run("pci=resource_alignment=30@00:01.0")?;
    ensure(
        value(&placed, "bars:")? != value(&moved, "bars:")?,
        format!("{placed}\n{moved}"),
    )?;
    ensure(moved.contains("written"), &moved)
}
