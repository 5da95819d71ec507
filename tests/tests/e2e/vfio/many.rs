//! Several devices of one guest, one of them with far more memory than the guest.

use fanlight_tests::{
    Result,
    common::{edu, pci::Function},
    ensure,
    host_side::guest::{Assets, GuestBuilder},
};

use super::whole_function;

const DISPLAY: &str = "1234:1111";

/// Three devices at once, one with a BAR of 16 GiB. Each has its BARs, both ends of the large one are memory, and DMA
/// of another device reaches it.
pub fn three_devices_and_16_gib(assets: &Assets) -> Result<()> {
    let mut script = String::new();
    let mut sizes = Vec::new();
    let mut addresses = Vec::new();
    for ids in [edu::IDS, edu::MEMORY_IDS, DISPLAY] {
        let address = whole_function(assets, ids)?;
        let function = Function::at(&address);
        sizes.extend(function.bars()?.iter().map(|bar| bar.size));
        script += &format!("guest-agent check-device '{}'\n", function.describe()?);
        addresses.push(address);
    }
    ensure(sizes.contains(&(16 << 30)), format!("{sizes:x?}"))?;
    ensure(sizes.contains(&(16 << 20)), format!("{sizes:x?}"))?;
    script += "guest-agent peer; guest-agent mark 7; guest-agent mark 8";
    let guest = assets.guest(&script).option("--log", "info");
    let with = |guest: GuestBuilder, address: &String| guest.option("--vfio", address);
    let said = addresses.iter().fold(guest, with).run()?;
    let tried = said.matches("agent: tried the device").count();
    ensure(tried == addresses.len(), &said)?;
    ensure(said.contains("edu copied 8192 bytes"), &said)?;
    ensure(!said.contains("cannot reach"), &said)?;
    // The value that was written at the end of the large BAR.
    ensure(said.contains("agent: mark was 7"), &said)
}
