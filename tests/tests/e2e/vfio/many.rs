//! Several devices of one guest's, one of them with far more memory than the guest.

use fanlight_tests::{
    Result, edu,
    guest::{Assets, ensure},
};

use super::{hardware, host_function, whole_function};

const DISPLAY: &str = "1234:1111";

/// Three devices at once, of which one has a BAR of 16 GiB: each is there with its BARs, both ends of the large one
/// are memory, and another device's DMA reaches it.
pub fn three_devices_and_16_gib(assets: &Assets) -> Result<()> {
    let script = format!(
        "{}; guest-agent peer; guest-agent mark 7; guest-agent mark 8",
        hardware::FUNCTIONS
    );
    let mut guest = assets.guest(&script).option("--log", "info");
    let mut sizes = Vec::new();
    let mut functions = Vec::new();
    for ids in [edu::IDS, edu::MEMORY_IDS, DISPLAY] {
        let address = whole_function(assets, ids)?;
        let function = host_function(&address)?;
        sizes.extend(hardware::bar_sizes(&function)?);
        functions.push(function);
        guest = guest.option("--vfio", address);
    }
    ensure(sizes.contains(&(16 << 30)), format!("{sizes:x?}"))?;
    ensure(sizes.contains(&(16 << 20)), format!("{sizes:x?}"))?;
    let said = guest.run()?;
    for function in &functions {
        hardware::is_among(function, &said)?;
    }
    ensure(said.contains("edu copied 8192 bytes"), &said)?;
    ensure(!said.contains("cannot reach"), &said)?;
    // What was written at the end of the large BAR.
    ensure(said.contains("agent: mark was 7"), &said)
}
