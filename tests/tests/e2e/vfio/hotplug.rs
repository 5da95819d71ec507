//! Passed-through devices that come and go while their guest runs.

use std::{fs, os::fd::AsFd, thread};

use fanlight_api::{
    client::Client,
    methods::{DeviceAdd, DeviceRemove, EventsSubscribe},
    types::{AddDevice, DeviceId, EventName, Subscribe},
};
use fanlight_tests::{
    Context, Failure, Result, common::edu, ensure, host_side::guest::Assets, value,
};

use super::{
    BYTES, IGB, PATIENCE, SHARE, UP, check_shared, igb_guest, inherited, interface_up, node, open,
    serve, virtual_function, whole_function, with_blobs,
};

/// A virtual function is added, removed with the guest's consent, added again as a descriptor, and taken back by the
/// host. The host also takes another device, which the guest cannot release. The guest keeps running. Its devices and
/// iommufd are open descriptors.
pub fn devices_come_and_go(assets: &Assets) -> Result<()> {
    let (physical, vf) = virtual_function(assets, IGB)?;
    let edu = whole_function(assets, edu::IDS)?;
    interface_up(&physical, "10.9.0.1/24")?;
    let script = format!(
        "edu=$(dirname $(grep -l 0x11e8 /sys/bus/pci/devices/*/device))
         {SHARE}; echo ready; while read -r line; do eval \"$line\"; done"
    );
    let guest = with_blobs(igb_guest(assets, &script)?)?;
    let socket = guest.path("api");
    let guest = guest
        .option("--api-socket", &socket)
        .option("--log", "info");
    let opened = [node(&edu)?, open("/dev/iommu")?];
    let [device, iommu] = [inherited(&opened[0])?, inherited(&opened[1])?];
    let spec = format!("{device},iommu={iommu},id=edu");
    let mut guest = guest.option("--vfio", spec).start()?;
    drop(opened);
    guest.wait_for("ready")?;
    let mut client = Client::connect(&socket).context("cannot connect")?;
    let mut watcher = Client::connect(&socket).context("cannot connect")?;
    watcher
        .call::<EventsSubscribe>(&Subscribe::default())
        .context("events.subscribe")?;
    watcher
        .socket()
        .set_read_timeout(Some(PATIENCE))
        .context("cannot set a timeout")?;
    let mut happens = |event: EventName, device: &str| loop {
        let next = watcher.next_event().context("no event")?;
        if next.event == event && next.device.as_deref() == Some(device) {
            return Ok::<_, Failure>(());
        }
    };
    let add = AddDevice {
        vfio: Some(format!("{vf},id=net").parse().context("bad device")?),
        ..Default::default()
    };
    for round in 1..=2 {
        let added = if round == 1 {
            client.call::<DeviceAdd>(&add).map(drop)
        } else {
            let handed = AddDevice {
                vfio: Some("fd:0,id=net".parse().context("bad device")?),
                ..Default::default()
            };
            let node = node(&vf)?;
            let fds = [node.as_fd()];
            client.call_with::<DeviceAdd>(&handed, &fds).map(drop)
        };
        added.context("device.add")?;
        happens(EventName::DeviceAdded, "net")?;
        guest.send(&format!(
            "until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done; {}; guest-agent call tcp:10.9.0.1:5000 {BYTES}\n",
            UP.replace('\n', ";")
        ))?;
        serve(&mut guest, round)?;
        let taken = client.call::<DeviceAdd>(&add).map(drop);
        ensure(taken.is_err(), "a device was added twice")?;
        if round == 1 {
            let id = "net".into();
            client
                .call::<DeviceRemove>(&DeviceId { id })
                .context("device.remove")?;
            happens(EventName::DeviceRemoved, "net")?;
        }
    }
    let unbind = |address: &str| {
        let address = address.to_owned();
        // The write returns when the device is released.
        thread::spawn(move || fs::write("/sys/bus/pci/drivers/vfio-pci/unbind", address))
    };
    for (address, id) in [(&vf, "net"), (&edu, "edu")] {
        let unbound = unbind(address);
        happens(EventName::DeviceRequested, id)?;
        happens(EventName::DeviceRemoved, id)?;
        let unbound = unbound.join().map_err(|_| Failure("a panic".into()))?;
        unbound.context(format!("cannot unbind {address}"))?;
    }
    guest.send(
        "echo left: $(ls /sys/class/net) $(head -c 2 $edu/config | od -An -tx1)
        echo asked: $(dmesg | grep -c 'Button press: will power off'); poweroff -f\n",
    )?;
    guest.expect_exit(0)?;
    let said = guest.transcript();
    check_shared(&said)?;
    ensure(value(&said, "left:")? == "lo ff ff", &said)?;
    // Twice for the interface: edu is behind no port, so the guest cannot be asked for it.
    ensure(value(&said, "asked:")? == "2", &said)
}
