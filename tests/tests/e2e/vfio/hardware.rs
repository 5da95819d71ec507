//! What any device must do, tried on one of this machine's: `FANLIGHT_TEST_VFIO` names it.

use std::fs;

use fanlight_devices::vfio::sysfs::HostFunction;
use fanlight_tests::{
    Context, Failure, Result,
    guest::{Assets, ensure, value},
};

use super::host_function;
use crate::Test;

/// Names the device, which is bound to vfio-pci.
pub const VARIABLE: &str = "FANLIGHT_TEST_VFIO";

pub const TESTS: &[(&str, Test)] = &[
    ("hardware::a_device_through_iommufd", |assets| {
        is_the_hosts(assets, "on")
    }),
    ("hardware::a_device_through_a_container", |assets| {
        is_the_hosts(assets, "off")
    }),
];

/// Prints ids and BARs of all that the guest has.
pub const FUNCTIONS: &str = "for function in /sys/bus/pci/devices/*; do
    echo function: $(cat $function/vendor $function/device) $(cat $function/resource)
done";

/// The guest's function is the host's, before and after the guest restarts.
fn is_the_hosts(assets: &Assets, iommufd: &str) -> Result<()> {
    let address = std::env::var(VARIABLE).context(VARIABLE)?;
    let function = host_function(&address)?;
    function.check_usable().context(VARIABLE)?;
    let script = format!(
        "{FUNCTIONS}
         mark=$(dd if=/dev/vda bs=4 count=1 2>/dev/null); echo mark: $mark
         if [ \"$mark\" != seen ]; then
             printf seen | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null; reboot -f; sleep 100
         fi"
    );
    let guest = assets.guest(&script);
    let image = guest.path("disk");
    fs::write(&image, vec![0; 1 << 20]).context("cannot make a disk")?;
    let said = guest
        .option("--disk", format!("path={}", image.display()))
        .option("--vfio", format!("{address},iommufd={iommufd}"))
        .run()?;
    let (first, second) = said
        .split_once("mark:")
        .ok_or_else(|| Failure(format!("no mark in {said}")))?;
    ensure(value(second, "mark:")? == "seen", &said)?;
    [first, second]
        .into_iter()
        .try_for_each(|life| is_among(&function, life))
}

/// One of the functions that a guest told of by [`FUNCTIONS`] has this one's ids and memory.
pub fn is_among(function: &HostFunction, said: &str) -> Result<()> {
    let id = |name| {
        let id = function.attribute(name).context(name)?;
        Ok::<_, Failure>(id)
    };
    let ids = [id("vendor")?, id("device")?];
    let sizes = bar_sizes(function)?;
    let theirs = said.lines().filter_map(|line| {
        let mut words = line.trim().strip_prefix("function:")?.split_whitespace();
        let theirs = [words.next()?, words.next()?];
        let rest: Vec<_> = words.collect();
        let lines: Vec<_> = rest.chunks(3).map(|line| line.join(" ")).collect();
        Some((theirs.map(str::to_owned), lines.join("\n")))
    });
    let is_it =
        |(other, resource): &([String; 2], String)| *other == ids && self::sizes(resource) == sizes;
    let found = theirs.collect::<Vec<_>>().iter().any(is_it);
    let address = function.address;
    ensure(
        found,
        format!("no function is {address}, {ids:?} with {sizes:x?}: {said}"),
    )
}

/// Sizes of a function's BARs, 0 for those that it has not.
pub fn bar_sizes(function: &HostFunction) -> Result<Vec<u64>> {
    function
        .attribute("resource")
        .map(|resource| sizes(&resource))
        .context("resource")
}

/// The same of a `resource` file.
fn sizes(resource: &str) -> Vec<u64> {
    const BARS: usize = 6;
    let hex = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok();
    let size = |line: &str| {
        let mut words = line.split_whitespace();
        let (start, last) = (hex(words.next()?)?, hex(words.next()?)?);
        Some(if last == 0 {
            0
        } else {
            last.checked_sub(start)?.checked_add(1)?
        })
    };
    resource.lines().take(BARS).filter_map(size).collect()
}
