//! Passed-through devices: drivers, data, interrupts, and leftovers on the host.

mod doctor;
pub mod hardware;
mod hotplug;
mod leaks;
mod many;
mod peers;

use std::{
    fs::{self, File},
    os::fd::{AsFd, AsRawFd},
    path::Path,
    process::Command,
    time::Duration,
};

use fanlight_api::{client::Client, methods::DeviceAdd, types::AddDevice};
use fanlight_devices::vfio::sysfs::HostFunction;
use fanlight_tests::{
    Context, Failure, Result,
    common::{
        echo::{self, Address},
        edu,
        pci::Function,
    },
    ensure,
    host_side::{
        guest::{Assets, Guest, GuestBuilder},
        test_case::TestCase,
    },
    nested_host::L1Device,
    value,
};

/// A device with a DMA engine, and one whose memory is its target.
pub const PEERS: &[L1Device] = &[L1Device::Edu, L1Device::Ivshmem(64)];

pub const TESTS: &[TestCase] = &[
    TestCase::new("vfio::igb_through_iommufd", |assets| igb_data(assets, "on"))
        .devices(&[L1Device::Igb]),
    TestCase::new("vfio::igb_through_a_container", |assets| {
        igb_data(assets, "off")
    })
    .devices(&[L1Device::Igb, L1Device::Edu]),
    TestCase::new("vfio::igb_over_driver_and_guest_resets", igb_resets).devices(&[L1Device::Igb]),
    TestCase::new("vfio::a_virtio_function", virtio_data).devices(&[L1Device::VirtioNet]),
    TestCase::new("vfio::a_disk_by_msi", |assets| disk(assets, "", "PCI-MSI"))
        .devices(&[L1Device::Ahci]),
    TestCase::new("vfio::a_disk_by_intx", |assets| {
        disk(assets, "pci=nomsi", "IO-APIC")
    })
    .devices(&[L1Device::Ahci]),
    TestCase::new("vfio::peers_through_iommufd", |assets| {
        peers::peers(assets, "on")
    })
    .devices(PEERS),
    TestCase::new("vfio::peers_through_a_container", |assets| {
        peers::peers(assets, "off")
    })
    .devices(PEERS),
    TestCase::new("vfio::memory_is_switched_under_reads", switched_under_reads)
        .devices(&[L1Device::Ivshmem(1)]),
    TestCase::new("vfio::devices_come_and_go", hotplug::devices_come_and_go)
        .devices(&[L1Device::Igb, L1Device::Edu]),
    TestCase::new(
        "vfio::three_devices_and_16_gib",
        many::three_devices_and_16_gib,
    )
    .devices(&[
        L1Device::Edu,
        L1Device::Ivshmem(16 << 10),
        L1Device::BochsDisplay,
    ]),
    TestCase::new(
        "vfio::fifty_starts_leave_nothing",
        leaks::fifty_starts_leave_nothing,
    )
    .devices(PEERS),
    TestCase::new("vfio::mistakes_are_named", mistakes).devices(&[L1Device::Igb]),
    TestCase::new("vfio::the_doctor_and_the_list", doctor::doctor_and_list)
        .devices(&[L1Device::Igb]),
];

const IGB: &str = "8086:10c9";
const VIRTIO_NET: &str = "1af4:1041";
const AHCI: &str = "8086:2922";
const BYTES: u64 = 2 << 20;
/// A machine that is silent for this long hangs; speed does not matter.
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs a command that must succeed, and returns its output.
pub fn run(program: &Path, arguments: &[&str]) -> Result<String> {
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

/// Creates one virtual function of the only function with these ids and binds it to vfio-pci.
fn virtual_function(assets: &Assets, ids: &str) -> Result<(String, String)> {
    let physical = Function::only(ids)?.address();
    let bound = run(&assets.fanlight, &["vfio", "bind", &physical, "--vfs", "1"])?;
    Ok((physical, bound))
}

/// Binds the last function with these ids to vfio-pci: L1's own controllers come first.
pub fn whole_function(assets: &Assets, ids: &str) -> Result<String> {
    let function = Function::find(ids)?.pop();
    let function = function.ok_or_else(|| Failure(format!("no function has ids {ids}")))?;
    run(&assets.fanlight, &["vfio", "bind", &function.address()])
}

fn ip(arguments: &str) -> Result<()> {
    let arguments: Vec<_> = arguments.split_whitespace().collect();
    run(Path::new("ip"), &arguments).map(drop)
}

/// Sets the address of a host function's network interface.
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

/// Sets eth0 up and prints its driver.
const UP: &str = "ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up; ip link set lo up
    until [ \"$(cat /sys/class/net/eth0/carrier 2>/dev/null)\" = 1 ]; do sleep 0.1; done
    echo driver: $(basename $(readlink /sys/class/net/eth0/device/driver))
    echo ids: $(cat /sys/class/net/eth0/device/vendor /sys/class/net/eth0/device/device)";

/// Prints the interrupt count of each of eth0's vectors.
const INTERRUPTS: &str = "grep eth0 /proc/interrupts | sed 's/^/interrupt: /'";

/// A guest with the VF's driver, whose packet buffers have one page each. QEMU's igb drops each packet that crosses
/// into a page of L1 that is not contiguous: `net_tx_pkt_add_raw_fragment_pci` expects one mapping.
fn igb_guest(assets: &Assets, script: &str) -> Result<GuestBuilder> {
    let script = format!("echo 1 > /proc/sys/net/core/high_order_alloc_disable\n{script}");
    assets.guest(&script).modules(&["igbvf"])
}

/// Adds a GPU to a guest with the edu device, which shares the GPU's blobs.
fn with_blobs(guest: GuestBuilder) -> Result<GuestBuilder> {
    let guest = guest.modules(&["virtio_gpu"])?;
    let guest = guest.option("--gpu", "outputs=640x480,renderer=venus");
    guest.with_graphics()
}

/// Has the device copy data within blobs.
const SHARE: &str = "mount -t debugfs debugfs /sys/kernel/debug; guest-agent shared-blobs";

/// Checks the output of the guest and of Fanlight after that.
fn check_shared(said: &str) -> Result<()> {
    let copied = said.contains("agent: a device copied in blobs that are shared");
    ensure(copied && !said.contains("cannot reach a blob"), said)
}

fn igb_data(assets: &Assets, iommufd: &str) -> Result<()> {
    let (physical, vf) = virtual_function(assets, IGB)?;
    interface_up(&physical, "10.9.0.1/24")?;
    let share = if iommufd == "on" { ":" } else { SHARE };
    let script = format!(
        "{share}; echo ready; until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
         {UP}; echo capabilities: $(od -An -tx1 -j256 -N4 /sys/class/net/eth0/device/config)
         guest-agent call tcp:10.9.0.1:5000 {BYTES}
         guest-agent serve tcp:0.0.0.0:5001
         {INTERRUPTS}"
    );
    let guest = igb_guest(assets, &script)?;
    let guest = guest.option("--log", "info");
    let mut guest = if iommufd == "on" {
        let device = format!("{vf},iommufd=on");
        guest.option("--vfio", device).start()?
    } else {
        in_container(assets, with_blobs(guest)?, &vf)?
    };
    serve(&mut guest, 1)?;
    guest.converse(|| echo::call(&Address::Tcp("10.9.0.2:5001".into()), BYTES))?;
    guest.expect_exit(0)?;
    let said = guest.transcript();
    let interface = if iommufd == "on" {
        "iommufd"
    } else {
        check_shared(&said)?;
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

/// The virtual function of a virtio network device, through both interfaces, before and after its driver unbinds. It
/// reports an INTx pin that it does not have.
fn virtio_data(assets: &Assets) -> Result<()> {
    let (physical, vf) = virtual_function(assets, VIRTIO_NET)?;
    interface_up(&physical, "10.9.0.1/24")?;
    let script = format!(
        "{UP}; guest-agent call tcp:10.9.0.1:5000 {BYTES}
         device=$(basename $(readlink -f /sys/class/net/eth0/device))
         echo $device > /sys/bus/virtio/drivers/virtio_net/unbind
         echo $device > /sys/bus/virtio/drivers/virtio_net/bind
         {UP}; guest-agent call tcp:10.9.0.1:5000 {BYTES}
         guest-agent serve tcp:0.0.0.0:5001
         grep 'put.0' /proc/interrupts | sed 's/^/interrupt: /'"
    );
    for (iommufd, name) in [("on", "iommufd"), ("off", "container")] {
        let mut guest = assets
            .guest(&script)
            .modules(&["virtio_net"])?
            .option("--vfio", format!("{vf},iommufd={iommufd}"))
            .option("--log", "info")
            .start()?;
        for round in 1..=2 {
            serve(&mut guest, round)?;
        }
        guest.converse(|| echo::call(&Address::Tcp("10.9.0.2:5001".into()), BYTES))?;
        guest.expect_exit(0)?;
        let said = guest.transcript();
        ensure(said.contains(&format!("iommu=\"{name}\"")), &said)?;
        ensure(value(&said, "driver:")? == "virtio_net", &said)?;
        let served = format!("agent: served {BYTES} bytes");
        ensure(said.contains(&served), &said)?;
        // One vector to receive and one to send.
        let counts = interrupt_counts(&said);
        ensure(counts.len() == 2, &said)?;
        ensure(counts.iter().all(|&count| count > 10), &said)?;
        ensure(said.contains("PCI-MSIX"), &said)?;
    }
    Ok(())
}

/// Starts a guest with a device whose group and container are open descriptors, and adds a second device by its open
/// group. A descriptor that is no group, or the group of another device, is refused.
fn in_container(assets: &Assets, guest: GuestBuilder, vf: &str) -> Result<Guest> {
    let edu = whole_function(assets, edu::IDS)?;
    let nodes = [group_node(&edu)?, open("/dev/vfio/vfio")?];
    let [group, container] = [inherited(&nodes[0])?, inherited(&nodes[1])?];
    let socket = guest.path("api");
    let mut guest = guest
        .option("--vfio", format!("{edu},group={group},iommu={container}"))
        .option("--api-socket", &socket)
        .start()?;
    drop(nodes);
    guest.wait_for("ready")?;
    let mut client = Client::connect(&socket).context("cannot connect")?;
    let mut add = |address: &str, group: &File| {
        let device = format!("{address},id=net,group=fd:0");
        let add = AddDevice {
            vfio: Some(device.parse().context("bad device")?),
            ..Default::default()
        };
        let added = client.call_with::<DeviceAdd>(&add, &[group.as_fd()]);
        added.map(drop).context("device.add")
    };
    let group = group_node(vf)?;
    let physical = Function::only(IGB)?.address();
    for (address, group, why) in [
        (vf, &open("/dev/null")?, "the group that was given is none"),
        (&physical, &group, "not to vfio-pci"),
    ] {
        let refused = add(address, group).err();
        let error =
            refused.ok_or_else(|| Failure("a wrong group descriptor was accepted".into()))?;
        ensure(error.to_string().contains(why), error)?;
    }
    add(vf, &group)?;
    Ok(guest)
}

/// Echoes the guest's bytes in the given round.
fn serve(guest: &mut Guest, round: usize) -> Result<()> {
    let served = guest.converse(|| echo::serve(&Address::Tcp("10.9.0.1:5000".into())))?;
    guest.wait_for_times(&format!("called with {BYTES} bytes"), round)?;
    ensure(
        served == BYTES,
        format!("{served} bytes arrived in round {round}"),
    )
}

/// The counts in the lines of [`INTERRUPTS`], for a guest with one vCPU.
fn interrupt_counts(said: &str) -> Vec<u64> {
    said.lines()
        .filter_map(|line| line.trim().strip_prefix("interrupt:"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse().ok())
        .collect()
}

/// Data crosses at first, after the driver unbinds and binds again, and after a restart.
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
    let guest = igb_guest(assets, &script)?.option("--vfio", &vf);
    let image = guest.path("disk");
    fs::write(&image, vec![0; 1 << 20]).context("cannot make a disk")?;
    let mut guest = guest
        .option("--disk", format!("path={}", image.display()))
        .start()?;
    for round in 1..=4 {
        guest.wait_for_times("driver:", round)?;
        let served = guest.converse(|| echo::serve(&Address::Tcp("10.9.0.1:5000".into())))?;
        ensure(
            served == BYTES,
            format!("{served} bytes arrived in round {round}"),
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

/// A disk behind a passed-through controller: written data reads back, and each request interrupts.
fn disk(assets: &Assets, cmdline: &str, kind: &str) -> Result<()> {
    let controller = whole_function(assets, AHCI)?;
    let said = assets
        .guest(
            "until [ -b /dev/sda ]; do sleep 0.1; done
             dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
             dd if=/tmp/data of=/dev/sda bs=256k conv=fsync 2>/dev/null
             echo 3 > /proc/sys/vm/drop_caches
             echo written: $(md5sum < /tmp/data)
             echo read: $(dd if=/dev/sda bs=256k count=32 2>/dev/null | md5sum)
             grep ahci /proc/interrupts | sed 's/^/interrupt: /'",
        )
        .modules(&["ahci", "sd_mod"])?
        .cmdline(cmdline)
        .option("--vfio", controller)
        .run()?;
    ensure(value(&said, "read:")? == value(&said, "written:")?, &said)?;
    ensure(value(&said, "interrupt:")?.contains(kind), &said)?;
    ensure(
        interrupt_counts(&said).iter().any(|&count| count > 10),
        &said,
    )
}

/// One vCPU reads a device's memory while another switches memory decoding off and on. The guest loses the memory before
/// the device does: KVM reports an access to memory that is off as an error.
fn switched_under_reads(assets: &Assets) -> Result<()> {
    const ROUNDS: u32 = 1000;
    let (ids, bar) = (edu::MEMORY_IDS, 2);
    let memory = whole_function(assets, ids)?;
    let script = format!("guest-agent switch-memory {ids} {bar} {ROUNDS}");
    let guest = assets.guest(&script).option("--cpus", "2");
    let said = guest.option("--vfio", memory).run()?;
    let done = format!("agent: memory was off {ROUNDS} times");
    ensure(said.contains(&done), &said)
}

fn host_function(address: &str) -> Result<HostFunction> {
    let function = HostFunction::find(address.parse().context("not a PCI address")?);
    function.ok_or_else(|| Failure(format!("no PCI device is at {address}")))
}

fn open(path: impl AsRef<Path>) -> Result<File> {
    let path = path.as_ref();
    let file = File::options().read(true).write(true).open(path);
    file.context(format!("cannot open {}", path.display()))
}

/// Opens the VFIO device node of a function.
fn node(address: &str) -> Result<File> {
    let node = host_function(address)?.character_device();
    open(node.ok_or_else(|| Failure(format!("{address} has no node")))?)
}

/// Opens the node of a function's group.
fn group_node(address: &str) -> Result<File> {
    let group = host_function(address)?.group();
    let group = group.ok_or_else(|| Failure(format!("{address} has no group")))?;
    open(format!("/dev/vfio/{group}"))
}

/// Makes a descriptor inheritable by programs that the test starts.
fn inherited(file: &File) -> Result<String> {
    rustix::io::fcntl_setfd(file, rustix::io::FdFlags::empty()).context("cannot pass it on")?;
    Ok(format!("fd:{}", file.as_raw_fd()))
}

fn mistakes(assets: &Assets) -> Result<()> {
    let physical = &Function::only(IGB)?.address();
    let refused = |vfio: &str| -> Result<String> {
        let mut guest = assets.guest("").option("--vfio", vfio).start()?;
        guest.expect_exit(2)?;
        Ok(guest.transcript())
    };
    let said = refused(physical)?;
    ensure(said.contains(&format!("bound to igb, not to vfio-pci; give it to user space with `fanlight vfio bind {physical}`")), &said)?;
    let interface = interface_up(physical, "10.9.0.1/24")?;
    let bound = Command::new(&assets.fanlight)
        .args(["vfio", "bind", physical])
        .output()
        .context("cannot run fanlight")?;
    let error = String::from_utf8_lossy(&bound.stderr).into_owned();
    let named = format!("in use: network interface {interface} is up");
    ensure(
        bound.status.code() == Some(2) && error.contains(&named),
        error,
    )?;
    ip(&format!("link set {interface} down"))?;
    let said = refused("0000:77:00.0")?;
    ensure(said.contains("no such PCI device"), &said)?;
    let (_, vf) = virtual_function(assets, IGB)?;
    let mut guest = igb_guest(assets, "echo ready; sleep 1000")?
        .option("--vfio", &vf)
        .start()?;
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
