//! Events reach their subscribers, the log follows its level, and only allowed users connect.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    process::Command,
};

use fanlight_api::types::EventName;
use fanlight_tests::{
    Context, Result, ensure,
    host_side::{
        guest::{Assets, Guest},
        test_case::TestCase,
    },
};
use serde_json::{Value, json};

use super::{Api, start};
pub const TESTS: &[TestCase] = &[TestCase::new("api::what_goes_wrong_is_told", goes_wrong)];

/// The entropy device.
const RNG: &str = "1af4:1044";
/// The warning in the log about a device whose driver broke the rules.
const LOGGED: &str = "the guest's driver broke the rules of queue 0";
/// A user that may use the API, and one that may not.
const FRIEND: u32 = 65533;
const STRANGER: u32 = 65532;

fn goes_wrong(assets: &Assets) -> Result<()> {
    let script = format!(
        "echo ready; while read line; do case $line in
            break) guest-agent break-device {RNG};;
            nmis) sleep 1; echo nmis: $(sed -n 's/.*NMI: *\\([0-9]*\\) *\\([0-9]*\\) .*/\\1 \\2/p' /proc/interrupts) count\"ed\";;
            fragile) echo 1 > /proc/sys/kernel/unknown_nmi_panic; echo it \"is\";;
        esac; done"
    );
    let guest = assets.guest(&script);
    let guest = guest
        .option("--api-allow-uid", FRIEND.to_string())
        .option("--cpus", "2");
    let (mut guest, mut api) = start(guest)?;
    guest.wait_for("ready")?;
    users(assets, &guest)?;

    api.call("events.subscribe", json!({}))?;
    let broken = |guest: &mut Guest, api: &mut Api, count| {
        guest.send("break\n")?;
        let event = api.event(EventName::DeviceError)?;
        ensure(event.device.as_deref() == Some("rng"), format!("{event:?}"))?;
        // ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, DEVICE_NEEDS_RESET.
        guest.wait_for_times("agent: the device's status is 0x4f", count)?;
        let stats = api.call("vm.stats", json!({}))?;
        let devices = stats["devices"].as_array().cloned().unwrap_or_default();
        let rng = devices.iter().find(|device| device["id"] == "rng");
        let errors = rng.map(|rng| rng["errors"].clone());
        ensure(errors == Some(json!(count)), stats)
    };
    // The first time, the log level hides it.
    api.call("log.set_level", json!({"level": "error"}))?;
    broken(&mut guest, &mut api, 1)?;
    api.refused("log.set_level", json!({"level": "loud"}), "invalid_params")?;
    api.call("log.set_level", json!({"level": "warn"}))?;
    broken(&mut guest, &mut api, 2)?;

    // Every vCPU receives the NMI. A guest can be configured to panic on it.
    api.call("vm.nmi", json!({}))?;
    guest.send("nmis\n")?;
    guest.wait_for("counted")?;
    ensure(
        guest.transcript().contains("nmis: 1 1 counted"),
        guest.transcript(),
    )?;
    guest.send("fragile\n")?;
    guest.wait_for("it is")?;
    api.call("vm.nmi", json!({}))?;
    api.event(EventName::Panic)?;
    let end = api.event(EventName::Shutdown)?;
    let end = serde_json::to_value(end).context("an event")?;
    ensure(end["ending"] == "panicked", end)?;
    guest.expect_exit(33)?;
    let said = guest.transcript();
    ensure(said.matches(LOGGED).count() == 1, said)
}

/// Allowed and refused users.
fn users(assets: &Assets, guest: &Guest) -> Result<()> {
    let socket = guest.path("api");
    let mode = fs::metadata(&socket).context("the socket")?.permissions();
    ensure(mode.mode() & 0o777 == 0o666, format!("{mode:?}"))?;
    let dir = guest.path("");
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o711)).context("cannot chmod")?;
    let ask = |user: u32| -> Result<(Option<i32>, Value, String)> {
        let output = Command::new(&assets.fanlight)
            .arg("ctl")
            .arg(&socket)
            .arg("vm.info")
            .uid(user)
            .gid(user)
            .output()
            .context("cannot run ctl")?;
        let said = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok((output.status.code(), said, errors))
    };
    let (code, info, errors) = ask(FRIEND)?;
    let served = code == Some(0) && info["state"] == "running";
    ensure(served, format!("{code:?} {info} {errors}"))?;
    let (code, info, errors) = ask(STRANGER)?;
    let refused = code == Some(1)
        && info.is_null()
        && errors.contains(&format!("user {STRANGER} may not use this socket"));
    ensure(refused, format!("{code:?} {info} {errors}"))
}
