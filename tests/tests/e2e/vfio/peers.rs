//! Memory of a passed-through device that other devices of the guest reach.

use fanlight_tests::{Context, Result, common::edu, ensure, host_side::guest::Assets, value};

use super::{hardware::faults::Faults, whole_function};

/// DMA of one device reaches the memory of another at its guest address. It does so at first, after memory decoding was
/// off, after a restart, and after the guest moved the BAR. While memory decoding is off, the host's IOMMU refuses it.
pub fn peers(assets: &Assets, iommufd: &str) -> Result<()> {
    let edu = whole_function(assets, edu::IDS)?;
    let memory = whole_function(assets, edu::MEMORY_IDS)?;
    let run = |script: &str, cmdline: &str| {
        let guest = assets.guest(script).cmdline(cmdline);
        guest
            .option("--vfio", format!("{edu},iommufd={iommufd}"))
            .option("--vfio", format!("{memory},iommufd={iommufd}"))
            .option("--log", "info")
            .run()
    };
    let said = run(
        "guest-agent peer; guest-agent mark 7 > /tmp/mark; cat /tmp/mark
         echo bar: $(sed -n 3p /sys/bus/pci/devices/0000:00:02.0/resource)
         grep -q 'was 7' /tmp/mark || { reboot -f; sleep 100; }",
        "",
    )?;
    ensure(said.matches("edu copied 8192 bytes").count() == 2, &said)?;
    ensure(!said.contains("cannot reach"), &said)?;
    let mut faults = Faults::of(&edu)?;
    let moved = run(
        "guest-agent peer; guest-agent absent-peer
         echo bar: $(sed -n 3p /sys/bus/pci/devices/0000:00:02.0/resource)",
        "pci=resource_alignment=30@00:02.0",
    )?;
    ensure(moved.contains("edu copied 8192 bytes"), &moved)?;
    ensure(value(&said, "bar:")? != value(&moved, "bar:")?, &moved)?;
    let absent = value(&moved, "agent: edu wrote to memory that was off: 0x")?;
    faults.comes_at(u64::from_str_radix(absent, 16).context("not an address")?)
}
