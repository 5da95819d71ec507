//! Requirements on every device, tried on devices of the nested host, and on a device of this machine if
//! `FANLIGHT_TEST_VFIO` names it.
//!
//! A feature that the device lacks or that cannot be tried is reported and is no failure. For devices of the nested
//! host the test lists all expected features by name.

pub mod faults;
mod memory;

use std::{
    fs,
    sync::{Mutex, PoisonError},
};

use fanlight_tests::{
    Context, Failure, Result,
    common::pci::Function,
    ensure,
    host_side::{guest::Assets, test_case::TestCase},
    nested_host::L1Device,
};

use faults::Faults;

use super::{AHCI, IGB, host_function, interface_up, virtual_function, whole_function};

/// Names a device that is bound to vfio-pci.
pub const VARIABLE: &str = "FANLIGHT_TEST_VFIO";

pub const TESTS: &[TestCase] = &[
    TestCase::new("hardware::a_device_through_iommufd", |assets| {
        devices(assets, true)
    })
    .devices(&[L1Device::Igb, L1Device::BochsDisplay])
    .or_named_device(),
    TestCase::new("hardware::a_device_through_a_container", |assets| {
        devices(assets, false)
    })
    .devices(&[L1Device::Ahci])
    .or_named_device(),
];

/// Fanlight's message if the host cannot map a BAR for other devices.
const OUT_OF_REACH: &str = "other devices cannot reach this BAR";
/// Vendor and device id of bochs-display.
const DISPLAY: &str = "1234:1111";

/// Tries the named device, or else those of the nested host, whose features are all known.
fn devices(assets: &Assets, iommufd: bool) -> Result<()> {
    /// There is one such device, and tests run in parallel.
    static DEVICE: Mutex<()> = Mutex::new(());
    if let Ok(address) = std::env::var(VARIABLE) {
        let _alone = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
        return try_device(assets, &address, iommufd).map(drop);
    }
    if iommufd {
        virtual_and_display(assets)
    } else {
        controller(assets)
    }
}

fn virtual_and_display(assets: &Assets) -> Result<()> {
    let (physical, vf) = virtual_function(assets, IGB)?;
    // The virtual function has a carrier while the physical function is up.
    interface_up(&physical, "10.9.0.1/24")?;
    let done = [
        "did: life 1: is 8086:10ca class 020000 bar0 0x4000 memory64 prefetchable bar3 0x4000 memory64 \
         prefetchable msi 0 msix 3",
        "did: life 1: driver igbvf",
        "did: life 1: sent 32 packets",
        "did: life 1: MSI-X with 3 vectors",
        "did: life 1: reset by flr",
        "did: life 2: driver igbvf",
        "did: life 2: sent 32 packets",
        "did: dma-buf of BAR 0, 0x4000 bytes, mapped for other devices",
        "did: dma-buf of BAR 3, 0x4000 bytes, mapped for other devices",
    ];
    try_known(assets, &vf, true, &done, &[])?;
    let display = whole_function(assets, DISPLAY)?;
    let done = [
        "did: life 1: is 1234:1111 class 038000 bar0 0x1000000 memory32 prefetchable bar2 0x1000 memory32 msi 0",
        "did: life 1: driver bochs-drm",
        "did: life 1: opened card0",
        "did: life 2: opened card0",
        "did: dma-buf of BAR 0, 0x1000000 bytes, mapped for other devices",
        "did: dma-buf of BAR 2, 0x1000 bytes, mapped for other devices",
        "did: a picture in BAR 0 was shown and exported",
    ];
    let not_done = ["interrupts, which it has none of", "a reset in the guest"];
    try_known(assets, &display, true, &done, &not_done)
}

fn controller(assets: &Assets) -> Result<()> {
    let controller = whole_function(assets, AHCI)?;
    let done = [
        "did: life 1: driver ahci",
        "did: life 1: read 1048576 bytes of sda",
        "did: life 1: MSI with 1 vectors",
        "did: life 2: read 1048576 bytes of sda",
        "did: dma-buf of BAR 5, 0x1000 bytes",
    ];
    try_known(assets, &controller, false, &done, &["a reset in the guest"])
}

/// Tries a device whose possible and impossible checks are known.
fn try_known(
    assets: &Assets,
    address: &str,
    iommufd: bool,
    done: &[&str],
    not_done: &[&str],
) -> Result<()> {
    let report = try_device(assets, address, iommufd)?;
    for known in done {
        let found = report.iter().any(|line| line.starts_with(known));
        ensure(found, format!("no {known:?} in {report:#?}"))?;
    }
    for line in report.iter().filter(|line| line.starts_with("not:")) {
        let known = not_done.iter().any(|known| line.contains(known));
        ensure(known, format!("{line:?} in {report:#?}"))?;
    }
    Ok(())
}

/// Runs every generic check on the function at `address`. Returns a line for each check that was done (`did:`), and for
/// each that could not be tried (`not:`).
fn try_device(assets: &Assets, address: &str, iommufd: bool) -> Result<Vec<String>> {
    let function = host_function(address).context(VARIABLE)?;
    function.check_usable().context(VARIABLE)?;
    let address = function.address.to_string();
    let faults = Faults::of(&address)?;
    let mut report = in_a_guest(assets, &address, iommufd)?;
    report.extend(memory::exported(&function, iommufd)?);
    if iommufd {
        report.extend(memory::shown(assets, &address)?);
    }
    faults.none_since()?;
    report.push("did: DMA, without a fault of the host's IOMMU".into());
    let interface = if iommufd { "iommufd" } else { "a container" };
    println!("{address} through {interface}: {report:#?}");
    Ok(report)
}

/// A stock guest with its driver for the device uses the device, resets it, uses it again, and restarts.
fn in_a_guest(assets: &Assets, address: &str, iommufd: bool) -> Result<Vec<String>> {
    let function = Function::at(address);
    let mut modules = assets.drivers.of(&function.attribute("modalias")?)?;
    let driver = if modules.is_empty() { "" } else { "driver" };
    // Creates disks from what a controller finds.
    modules.push("sd_mod".into());
    let agent = format!(
        "guest-agent check-device '{}' {driver}",
        function.describe()?
    );
    let script = format!(
        "mark=$(dd if=/dev/vda bs=4 count=1 2>/dev/null)
         if [ \"$mark\" = seen ]; then {agent}; exit; fi
         {agent} reset; echo restarts
         printf seen | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null; reboot -f; sleep 100"
    );
    let guest = assets.guest(&script).modules(&modules)?;
    let image = guest.path("disk");
    fs::write(&image, vec![0; 1 << 20]).context("cannot make a disk")?;
    let iommufd = if iommufd { "on" } else { "off" };
    // GPU drivers are large.
    let is_display = function.class()? >> 16 == 3;
    let memory = if is_display { "512M" } else { "256M" };
    let said = guest
        .option("--memory", memory)
        .option("--disk", format!("path={}", image.display()))
        .option("--vfio", format!("{address},iommufd={iommufd}"))
        .option("--log", "info")
        .run()?;
    let lives = said.split_once("restarts");
    let (first, second) = lives.ok_or_else(|| Failure(format!("no restart in {said}")))?;
    let mut report = Vec::new();
    for (life, said) in (1..).zip([first, second]) {
        ensure(said.contains("agent: tried the device"), said)?;
        for line in said.lines().map(str::trim) {
            for kind in ["did: ", "not: "] {
                let rest = line.strip_prefix(kind);
                report.extend(rest.map(|rest| format!("{kind}life {life}: {rest}")));
            }
        }
    }
    report.push(
        match said.lines().find(|line| line.contains(OUT_OF_REACH)) {
            Some(line) => format!("not: its memory for other devices of the guest: {line}"),
            None => "did: its memory is in reach of other devices of the guest".into(),
        },
    );
    Ok(report)
}
