//! Devices of the host's in the guest's hands: drivers, data, interrupts, and what is left behind.

use std::{fs, path::Path, process::Command};

use fanlight_tests::{
    Context, Failure, Result,
    bed::L1Device,
    echo::{self, Address},
    guest::{Assets, Guest, GuestBuilder, ensure, value},
};

use crate::Test;

pub const TESTS: &[(&str, Test)] = &[
    ("vfio::igb_through_iommufd", |assets| igb_data(assets, "on")),
    ("vfio::igb_through_a_container", |assets| {
        igb_data(assets, "off")
    }),
    ("vfio::igb_over_driver_and_guest_resets", igb_resets),
    ("vfio::virtio_net", virtio_net),
    ("vfio::nothing_is_left_behind", leaks),
    ("vfio::mistakes_are_named", mistakes),
];

/// What a test's L1 has to pass through.
pub fn l1_devices(name: &str) -> &'static [L1Device] {
    match name {
        "vfio::virtio_net" => &[L1Device::VirtioNet],
        _ if name.starts_with("vfio::") => &[L1Device::Igb],
        _ => &[],
    }
}

const IGB: &str = "8086:10c9";
const VIRTIO_NET: &str = "1af4:1041";
const BYTES: u64 = 2 << 20;

/// Addresses of the host's functions with these ids.
fn find(ids: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/bus/pci/devices").context("cannot list PCI devices")? {
        let path = entry.context("cannot list PCI devices")?.path();
        let id = |name| {
            let text = fs::read_to_string(path.join(name)).unwrap_or_default();
            text.trim().trim_start_matches("0x").to_owned()
        };
        if format!("{}:{}", id("vendor"), id("device")) == ids {
            found.extend(
                path.file_name()
                    .map(|name| name.to_string_lossy().into_owned()),
            );
        }
    }
    found.sort();
    Ok(found)
}

/// Runs a command that must succeed; what it printed.
fn run(program: &Path, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .context(format!("cannot run {}", program.display()))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure(
        output.status.success(),
        format!(
            "{} {arguments:?} ({}): {errors}",
            program.display(),
            output.status
        ),
    )?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Makes one virtual function of the only function with these ids and binds it to vfio-pci.
fn virtual_function(assets: &Assets, ids: &str) -> Result<(String, String)> {
    let functions = find(ids)?;
    let [physical] = &functions[..] else {
        return Err(Failure(format!("{functions:?} have ids {ids}")));
    };
    let bound = run(&assets.fanlight, &["vfio", "bind", physical, "--vfs", "1"])?;
    Ok((physical.clone(), bound))
}

fn ip(arguments: &str) -> Result<()> {
    let arguments: Vec<_> = arguments.split_whitespace().collect();
    run(Path::new("ip"), &arguments).map(drop)
}

/// Gives the interface of a function of the host's an address.
fn interface_up(function: &str, address: &str) -> Result<String> {
    let dir = format!("/sys/bus/pci/devices/{function}");
    let interface = run(
        Path::new("sh"),
        &[
            "-c",
            &format!("ls -d {dir}/net/* {dir}/virtio*/net/* 2>/dev/null | sed 's,.*/,,'"),
        ],
    )?;
    ip(&format!("addr add {address} dev {interface}"))?;
    ip(&format!("link set {interface} up"))?;
    Ok(interface)
}

/// Has eth0, and says by which driver.
const UP: &str = "ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up; ip link set lo up
    until [ \"$(cat /sys/class/net/eth0/carrier 2>/dev/null)\" = 1 ]; do sleep 0.1; done
    echo driver: $(basename $(readlink /sys/class/net/eth0/device/driver))
    echo ids: $(cat /sys/class/net/eth0/device/vendor /sys/class/net/eth0/device/device)";

/// How often eth0's vectors came, one sum for each.
const INTERRUPTS: &str = "grep eth0 /proc/interrupts | sed 's/^/interrupt: /'";

fn igb_guest(assets: &Assets, script: &str, vf: &str) -> Result<GuestBuilder> {
    let guest = assets.guest(script).modules(&["igbvf"])?;
    Ok(guest.option("--vfio", vf))
}

fn igb_data(assets: &Assets, iommufd: &str) -> Result<()> {
    let (physical, vf) = virtual_function(assets, IGB)?;
    interface_up(&physical, "10.9.0.1/24")?;
    let script = format!(
        "{UP}; echo capabilities: $(od -An -tx1 -j256 -N4 /sys/class/net/eth0/device/config)
         guest-agent call tcp:10.9.0.1:5000 {BYTES}
         guest-agent serve tcp:0.0.0.0:5001
         {INTERRUPTS}"
    );
    let mut guest = igb_guest(assets, &script, &format!("{vf},iommufd={iommufd}"))?
        .option("--log", "info")
        .start()?;
    guest.wait_for("driver:")?;
    let served = echo::serve(&Address::Tcp("10.9.0.1:5000".into()))?;
    ensure(served == BYTES, format!("{served} bytes came"))?;
    echo::call(&Address::Tcp("10.9.0.2:5001".into()), BYTES)?;
    guest.expect_exit(0)?;
    let said = guest.transcript();
    let interface = if iommufd == "on" {
        "iommufd"
    } else {
        "container"
    };
    ensure(said.contains(&format!("iommu=\"{interface}\"")), &said)?;
    ensure(value(&said, "driver:")? == "igbvf", &said)?;
    ensure(value(&said, "ids:")? == "0x8086 0x10ca", &said)?;
    ensure(
        said.contains(&format!("agent: called with {BYTES} bytes")),
        &said,
    )?;
    ensure(
        said.contains(&format!("agent: served {BYTES} bytes")),
        &said,
    )?;
    // igbvf has three vectors: one to send, one to receive, one for the link.
    let counts = interrupt_counts(&said);
    ensure(counts.len() == 3, &said)?;
    ensure(
        counts.iter().filter(|&&count| count > 10).count() >= 2,
        &said,
    )?;
    ensure(said.contains("PCI-MSIX"), &said)
}

/// The counts in the lines of [`INTERRUPTS`], which has one processor.
fn interrupt_counts(said: &str) -> Vec<u64> {
    said.lines()
        .filter_map(|line| line.trim().strip_prefix("interrupt:"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse().ok())
        .collect()
}

/// The driver goes and comes back, then the guest restarts, and each time data crosses.
fn igb_resets(assets: &Assets) -> Result<()> {
    let (physical, vf) = virtual_function(assets, IGB)?;
    interface_up(&physical, "10.9.0.1/24")?;
    let script = format!(
        "{UP}; guest-agent call tcp:10.9.0.1:5000 {BYTES}
         device=$(basename $(readlink -f /sys/class/net/eth0/device))
         echo $device > /sys/bus/pci/drivers/igbvf/unbind
         echo 1 > /sys/bus/pci/devices/$device/reset; echo reset: $?
         echo $device > /sys/bus/pci/drivers/igbvf/bind
         {UP}; guest-agent call tcp:10.9.0.1:5000 {BYTES}
         mark=$(dd if=/dev/vda bs=4 count=1 2>/dev/null)
         if [ \"$mark\" != seen ]; then
             printf seen | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null; reboot -f; sleep 100
         fi"
    );
    let guest = igb_guest(assets, &script, &vf)?;
    let image = guest.path("disk");
    fs::write(&image, vec![0; 1 << 20]).context("cannot make a disk")?;
    let mut guest = guest
        .option("--disk", format!("path={}", image.display()))
        .start()?;
    for round in 1..=4 {
        guest.wait_for_times("driver:", round)?;
        let served = echo::serve(&Address::Tcp("10.9.0.1:5000".into()))?;
        ensure(
            served == BYTES,
            format!("{served} bytes came in round {round}"),
        )?;
    }
    guest.expect_exit(0)?;
    let said = guest.transcript();
    ensure(said.matches("fanlight-init: up").count() == 2, &said)?;
    ensure(said.matches("reset: 0").count() == 2, &said)?;
    ensure(
        said.matches(&format!("called with {BYTES} bytes")).count() == 4,
        &said,
    )
}

/// A virtual function that tells of an INTx pin that it has not.
fn virtio_net(assets: &Assets) -> Result<()> {
    let (_, vf) = virtual_function(assets, VIRTIO_NET)?;
    let said = assets
        .guest(
            "echo driver: $(basename $(readlink /sys/class/net/eth0/device/driver))
             echo pin: $(od -An -tu1 -j61 -N1 /sys/bus/pci/devices/0000:00:01.0/config)
             ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up
             ping -c 3 10.0.2.2; grep virtio0 /proc/interrupts | sed 's/^/interrupt: /'",
        )
        .option("--vfio", vf)
        .run()?;
    ensure(value(&said, "driver:")? == "virtio_net", &said)?;
    ensure(value(&said, "pin:")? == "0", &said)?;
    ensure(said.contains("3 packets received"), &said)?;
    ensure(
        interrupt_counts(&said).iter().any(|&count| count >= 3),
        &said,
    )
}

/// Starts and stops many machines in both ways, and asks the kernel what they left.
fn leaks(assets: &Assets) -> Result<()> {
    const TIMES: usize = 25;
    let (_, vf) = virtual_function(assets, IGB)?;
    for iommufd in ["on", "off"] {
        for _ in 0..TIMES {
            // Ends before its first instruction: there is no such file of RAM.
            let mut guest = igb_guest(assets, "", &format!("{vf},iommufd={iommufd}"))?
                .cmdline("panic=-1 root=/dev/nothing rdinit=/nothing")
                .option("--on-panic", "exit")
                .start()?;
            guest.expect_exit(33)?;
        }
    }
    let mut guest = igb_guest(assets, "echo ready; sleep 1000", &vf)?.start()?;
    guest.wait_for("ready")?;
    let before = held(&guest)?;
    drop(guest);
    let _ = before;
    // What is still open or mapped would keep the function from being taken away.
    run(&assets.fanlight, &["vfio", "unbind", &find(IGB)?[0]])?;
    ensure(
        find("8086:10ca")?.is_empty(),
        "the virtual function is still there",
    )
}

/// Descriptors and mappings that a running machine has of its device.
fn held(guest: &Guest) -> Result<usize> {
    let maps = fs::read_to_string(format!("/proc/{}/maps", guest.pid())).context("no maps")?;
    Ok(maps.lines().filter(|line| line.contains("vfio")).count())
}

fn mistakes(assets: &Assets) -> Result<()> {
    let functions = find(IGB)?;
    let physical = &functions[0];
    let refused = |vfio: &str| -> Result<String> {
        let mut guest = assets.guest("").option("--vfio", vfio).start()?;
        guest.expect_exit(2)?;
        Ok(guest.transcript())
    };
    let said = refused(physical)?;
    ensure(said.contains(&format!("bound to igb, not to vfio-pci; give it to user space with `fanlight vfio bind {physical}`")), &said)?;
    let said = refused("0000:77:00.0")?;
    ensure(said.contains("no such PCI device"), &said)?;
    let (_, vf) = virtual_function(assets, IGB)?;
    let mut guest = igb_guest(assets, "echo ready; sleep 1000", &vf)?.start()?;
    guest.wait_for("ready")?;
    let said = refused(&vf)?;
    ensure(said.contains("in use by another process"), &said)?;
    let taken = Command::new(&assets.fanlight)
        .args(["vfio", "unbind", physical])
        .output()
        .context("cannot run fanlight")?;
    let error = String::from_utf8_lossy(&taken.stderr);
    ensure(
        taken.status.code() == Some(2) && error.contains("in use: process fanlight"),
        &error,
    )
}
