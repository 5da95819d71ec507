//! Interrupts of devices: KVM delivers them without a thread of Fanlight, and a masked one waits.

use std::collections::BTreeMap;

use fanlight_tests::{
    Result,
    common::edu,
    ensure,
    host_side::{
        guest::{Assets, GuestKernel},
        process_activity,
        test_case::TestCase,
    },
    nested_host::L1Device,
};

use super::vfio::whole_function;

pub const TESTS: &[TestCase] = &[
    TestCase::new("interrupts::no_thread_relays_them", no_relay).devices(&[L1Device::Edu]),
    TestCase::new("interrupts::a_masked_one_waits", masked),
];

/// Interrupts of the passed-through device.
const COUNT: u64 = 1000;
/// Threads in the table of ARCHITECTURE.md that such a guest can have, and the one that KVM adds to each machine.
const THREADS: [&str; 5] = ["fanlight", "vcpu0", "rng", "serial", "kvm-nx-lpage-re"];

/// While a passed-through device interrupts, all threads are known, and none but the vCPU's waits as often as the
/// device interrupts.
fn no_relay(assets: &Assets) -> Result<()> {
    let edu = whole_function(assets, edu::IDS)?;
    let script = format!("echo ready; read -r line; guest-agent interrupts msi {COUNT} hold");
    // Debian's kernel is built without the no-IOMMU mode of vfio-pci.
    let mut guest = assets
        .guest(&script)
        .kernel(GuestKernel::Vmlinux)
        .cmdline("vfio.enable_unsafe_noiommu_mode=1")
        .option("--vfio", edu)
        .start()?;
    guest.wait_for("ready")?;
    let before = waits(guest.pid())?;
    guest.send("\n")?;
    guest.wait_for("agent: holds the interrupt")?;
    let after = waits(guest.pid())?;
    let relay = after.iter().find(|(name, waits)| {
        let new = **waits - before.get(*name).unwrap_or(&0);
        *name != "vcpu0" && new >= COUNT / 2
    });
    ensure(relay.is_none(), format!("{before:?}, then {after:?}"))?;
    guest.send("\n")?;
    guest.expect_exit(0)?;
    let said = guest.transcript();
    ensure(said.contains(&format!("agent: {COUNT} of msi took")), &said)
}

/// How often each thread of the process has waited. None may be unknown, or there twice.
fn waits(pid: u32) -> Result<BTreeMap<String, u64>> {
    let mut waits = BTreeMap::new();
    for (name, count) in process_activity::waits(pid) {
        ensure(THREADS.contains(&&*name), format!("a thread {name:?}"))?;
        let other = waits.insert(name.clone(), count);
        ensure(other.is_none(), format!("two threads {name:?}"))?;
    }
    ensure(waits.contains_key("vcpu0"), format!("{waits:?}"))?;
    Ok(waits)
}

/// The program maps registers of a device that has a driver.
fn masked(assets: &Assets) -> Result<()> {
    let guest = assets.guest("guest-agent masked-vector");
    let said = guest.cmdline("iomem=relaxed").run()?;
    ensure(said.contains("agent: a masked vector waited"), &said)
}
