//! Devices that come, go and grow while the guest runs.

use std::{fs::OpenOptions, os::unix::fs::FileExt};

use fanlight_api::types::EventName;
use fanlight_tests::{
    Context, Result,
    common::echo::{self, Address},
    ensure,
    host_side::{
        guest::{Assets, Guest, make_image},
        test_case::TestCase,
    },
};
use serde_json::json;

use super::{Api, start};
use crate::e2e::network::ip;

pub const TESTS: &[TestCase] = &[
    TestCase::new("api::a_disk_comes_and_goes", hotplug_disk),
    TestCase::new("api::a_disk_added_stays_over_a_reset", hotplug_reset),
    TestCase::new("api::a_removal_outlives_a_reset", removal_and_reset),
    TestCase::new("api::an_interface_comes_and_goes", hotplug_net),
    TestCase::new("api::a_disk_grows", resize),
];

/// Follows the disk vda: waits for it, writes to it, and reports, as each line asks.
const WATCH_DISK: &str = "echo ready; while read line; do case $line in
        come) while [ ! -b /dev/vda ]; do sleep 0.1; done; echo came $(cat /sys/block/vda/serial);;
        write) printf written-by-the-guest | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null; echo wrote;;
        mount) mke2fs -q /dev/vda && mount -t ext4 /dev/vda /mnt && echo x > /mnt/x && sync; echo mounted;;
        gone) while [ -e /sys/block/vda ]; do sleep 0.1; done; echo gone; umount -l /mnt 2>/dev/null;;
    esac; echo done $line; done";

fn hotplug_disk(assets: &Assets) -> Result<()> {
    let builder = assets.guest(WATCH_DISK).modules(&["ext4"])?;
    let image = builder.path("disk");
    make_image(assets, &image, "raw", "16M")?;
    let (mut guest, mut api) = start(builder)?;
    guest.wait_for("ready")?;
    let mut watcher = Api::connect(&guest.path("api"))?;
    watcher.call(
        "events.subscribe",
        json!({"events": ["device_added", "device_removed"]}),
    )?;
    let ask = |guest: &mut Guest, what: &str, count| {
        guest.send(&format!("{what}\n"))?;
        guest.wait_for_times(&format!("done {what}"), count)
    };
    ensure(
        api.call("device.list", json!({}))?["free_ports"] == json!([1, 2, 3, 4]),
        "other ports",
    )?;
    let disk = json!({"disk": {"path": image, "serial": "hot", "port": 2}});
    for (round, use_it) in [(1, "write"), (2, "mount")] {
        let added = api.call("device.add", disk.clone())?;
        ensure(added == json!({"id": "disk0", "port": 2}), added)?;
        watcher.event(EventName::DeviceAdded)?;
        api.refused("device.add", disk.clone(), "exists")?;
        let disks = &api.call("vm.config", json!({}))?["disk"];
        ensure(disks[0]["id"] == "disk0" && disks[0]["port"] == 2, disks)?;
        ask(&mut guest, "come", round)?;
        ask(&mut guest, use_it, 1)?;
        let list = api.call("device.list", json!({}))?;
        let device = list["devices"]
            .as_array()
            .and_then(|list| list.last())
            .cloned();
        let device = device.unwrap_or_default();
        ensure(device["active"] == true && device["port"] == 2, &device)?;
        ensure(device["bars"][0]["address"].as_u64() > Some(0), &device)?;
        let stats = api.call("vm.stats", json!({}))?;
        let queue = &stats["devices"]
            .as_array()
            .and_then(|all| all.last())
            .cloned();
        let queue = &queue.clone().unwrap_or_default()["queues"][0];
        ensure(queue["bytes_from_guest"].as_u64() > Some(100), queue)?;
        api.call("device.remove", json!({"id": "disk0"}))?;
        api.refused("device.remove", json!({"id": "disk0"}), "busy")?;
        let event = watcher.event(EventName::DeviceRemoved)?;
        ensure(event.device.as_deref() == Some("disk0"), "another device")?;
        ask(&mut guest, "gone", round)?;
        ensure(
            api.call("vm.config", json!({}))?["disk"] == json!([]),
            "still there",
        )?;
        // The image is no longer locked.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&image)
            .context("the image")?;
        if round == 1 {
            let mut start = [0; 20];
            file.read_exact_at(&mut start, 0).context("the image")?;
            ensure(&start == b"written-by-the-guest", format!("{start:?}"))?;
        }
    }
    api.refused("device.remove", json!({"id": "disk0"}), "not_found")?;
    api.refused("device.remove", json!({"id": "rng"}), "bad_input")?;
    let said = guest.transcript();
    ensure(said.contains("came hot"), &said)
}

fn hotplug_reset(assets: &Assets) -> Result<()> {
    let builder = assets.guest(WATCH_DISK);
    let image = builder.path("disk");
    make_image(assets, &image, "raw", "16M")?;
    let (mut guest, mut api) = start(builder)?;
    guest.wait_for("ready")?;
    api.call("device.add", json!({"disk": {"path": image}}))?;
    api.call("vm.reset", json!({}))?;
    guest.wait_for_times("ready", 2)?;
    guest.send("come\nwrite\n")?;
    guest.wait_for("done write")?;
    let list = api.call("device.list", json!({}))?;
    let devices = list["devices"].as_array();
    let disk = devices.and_then(|all| all.iter().find(|device| device["id"] == "disk0"));
    ensure(disk.is_some_and(|disk| disk["port"] == 1), &list)
}

/// A reset comes while Linux waits its five seconds. The device does not come back.
fn removal_and_reset(assets: &Assets) -> Result<()> {
    let builder = assets.guest(WATCH_DISK);
    let image = builder.path("disk");
    make_image(assets, &image, "raw", "16M")?;
    let (mut guest, mut api) = start(builder)?;
    guest.wait_for("ready")?;
    let mut watcher = Api::connect(&guest.path("api"))?;
    watcher.call("events.subscribe", json!({"events": ["device_removed"]}))?;
    api.call("device.add", json!({"disk": {"path": image}}))?;
    guest.send("come\n")?;
    guest.wait_for("done come")?;
    api.call("device.remove", json!({"id": "disk0"}))?;
    api.call("vm.reset", json!({}))?;
    let event = watcher.event(EventName::DeviceRemoved)?;
    ensure(event.device.as_deref() == Some("disk0"), "another device")?;
    let list = api.call("device.list", json!({}))?;
    let mut devices = list["devices"].as_array().into_iter().flatten();
    ensure(!devices.any(|device| device["id"] == "disk0"), &list)
}

fn hotplug_net(assets: &Assets) -> Result<()> {
    const BYTES: u64 = 2 << 20;
    let script = format!(
        "ip link set lo up; echo ready; while [ ! -e /sys/class/net/eth0 ]; do sleep 0.1; done
        echo mac: $(cat /sys/class/net/eth0/address)
        ip addr add 10.0.67.2/24 dev eth0; ip link set eth0 up
        guest-agent call tcp:10.0.67.1:5000 {BYTES}
        while [ -e /sys/class/net/eth0 ]; do sleep 0.1; done; echo gone"
    );
    let (mut guest, mut api) = start(assets.guest(&script))?;
    guest.wait_for("ready")?;
    let net = json!({"net": {"tap": "taph", "mac": "52:54:00:00:00:42", "id": "lan"}});
    api.call("device.add", net)?;
    guest.wait_for("mac: 52:54:00:00:00:42")?;
    ip("addr add 10.0.67.1/24 dev taph")?;
    ip("link set taph up")?;
    let served = guest.converse(|| echo::serve(&Address::Tcp("10.0.67.1:5000".into())))?;
    ensure(served == BYTES, format!("{served} bytes came"))?;
    // The guest has checked every byte that it received.
    guest.wait_for(&format!("agent: called with {BYTES} bytes"))?;
    api.call("device.remove", json!({"id": "lan"}))?;
    guest.wait_for("gone")?;
    guest.expect_exit(0)
}

fn resize(assets: &Assets) -> Result<()> {
    let script = "echo size: $(cat /sys/block/vda/size)
        while [ $(cat /sys/block/vda/size) = 2048 ]; do sleep 0.1; done
        echo new: $(cat /sys/block/vda/size)
        printf end | dd of=/dev/vda bs=512 seek=8191 conv=fsync,notrunc 2>/dev/null; echo wrote";
    let builder = assets.guest(script);
    let image = builder.path("disk");
    make_image(assets, &image, "qcow2", "1M")?;
    let disk = format!("path={},format=qcow2,id=data", image.display());
    let (mut guest, mut api) = start(builder.option("--disk", disk))?;
    guest.wait_for("size: 2048")?;
    api.refused(
        "disk.resize",
        json!({"id": "data", "size": "512K"}),
        "bad_input",
    )?;
    api.refused(
        "disk.resize",
        json!({"id": "dat", "size": "4M"}),
        "not_found",
    )?;
    let size = api.call("disk.resize", json!({"id": "data", "size": "4M"}))?;
    ensure(size["size"] == 4 << 20, size)?;
    guest.wait_for("new: 8192")?;
    guest.wait_for("wrote")?;
    guest.expect_exit(0)
}
