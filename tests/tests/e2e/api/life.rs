//! A machine from creation to its end, and a guest clock that stops while the machine is paused.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use fanlight_api::types::EventName;
use fanlight_tests::{
    Context, Failure, Result, ensure,
    host_side::{
        guest::{Assets, PRESSED},
        test_case::TestCase,
        tiny_kernel::tiny_kernel,
    },
    value,
};
use rustix::process::Signal;
use serde_json::json;

use super::{Api, Console, Served, machine, serve, start};
pub const TESTS: &[TestCase] = &[
    TestCase::new("api::a_whole_life", whole_life),
    TestCase::new("api::a_paused_guest_shuts_down_at_sigterm", paused_sigterm),
    TestCase::new("api::many_resets_in_a_row", many_resets),
    TestCase::new("api::a_paused_clock_stands_still", |assets| {
        pause(assets, "")
    }),
    TestCase::new("api::a_paused_time_stamp_counter_stands_still", |assets| {
        pause(assets, "clocksource=tsc tsc=reliable")
    }),
];

fn whole_life(assets: &Assets) -> Result<()> {
    let dir = tempfile::tempdir().context("a directory")?;
    let Served {
        mut guest,
        socket,
        mut api,
    } = serve(assets, None)?;
    let config = machine(assets, dir.path(), PRESSED)?;
    ensure(
        api.call("vm.info", json!({}))?["state"] == "none",
        "a machine",
    )?;
    let text = api.refused("vm.boot", json!({}), "wrong_state")?;
    ensure(
        text == "vm.boot: there is no machine; it must be created",
        text,
    )?;
    let mut misspelt = config.clone();
    misspelt["mmory"] = json!({"size": "1G"});
    let text = api.refused("vm.create", misspelt, "invalid_params")?;
    ensure(text.contains("did you mean memory?"), text)?;
    api.refused("vm.create", json!({"kernel": "/nowhere"}), "bad_input")?;

    let mut watcher = Api::connect(&socket)?;
    watcher.call("events.subscribe", json!({}))?;
    let mut waiter = Api::connect(&socket)?;
    let created = api.call("vm.create", config.clone())?;
    ensure(created["state"] == "created", created)?;
    api.refused("vm.create", config.clone(), "wrong_state")?;
    let mut console = Console::attach(&mut api)?;
    api.refused("console.attach", json!({}), "busy")?;
    api.call("vm.boot", json!({}))?;
    let waiting = thread::spawn(move || waiter.call("vm.wait", json!({})));
    console.wait_for("ready")?;
    let text = api.refused("vm.resume", json!({}), "wrong_state")?;
    ensure(
        text == "vm.resume: the machine is running; it must be paused",
        text,
    )?;
    api.call("vm.pause", json!({}))?;
    api.refused("vm.pause", json!({}), "wrong_state")?;
    api.refused("vm.power_button", json!({}), "wrong_state")?;
    api.refused("vm.nmi", json!({}), "wrong_state")?;
    ensure(
        api.call("vm.info", json!({}))?["state"] == "paused",
        "not paused",
    )?;
    api.call("vm.resume", json!({}))?;
    api.call("vm.pause", json!({}))?;
    api.call("vm.reset", json!({}))?;
    ensure(api.call("vm.info", json!({}))?["resets"] == 1, "no reset")?;
    console.1.clear();
    console.wait_for("ready")?;
    ensure(
        api.call("vm.config", json!({}))?["initrd"] == config["initrd"],
        "another machine",
    )?;
    let stats = api.call("vm.stats", json!({}))?;
    ensure(stats["vcpus"][0]["io_out"].as_u64() > Some(100), &stats)?;
    ensure(
        stats["memory"]["guest_allocated"].as_u64() > Some(20 << 20),
        &stats,
    )?;
    api.call("vm.power_button", json!({}))?;
    let ended = waiting.join().map_err(|_| Failure("panicked".into()))??;
    ensure(
        ended == json!({"ending": "power_off", "exit_status": 0}),
        ended,
    )?;
    let info = api.call("vm.info", json!({}))?;
    ensure(
        info["state"] == "stopped" && info["ending"] == "power_off",
        info,
    )?;
    api.refused("vm.resume", json!({}), "wrong_state")?;
    let mut names = Vec::new();
    let mut last = 0;
    while names.last() != Some(&EventName::Shutdown) {
        let event = watcher.client.next_event().context("an event")?;
        ensure(
            event.sequence == last + 1 && event.lost == 0,
            format!("{event:?}"),
        )?;
        last = event.sequence;
        names.push(event.event);
    }
    let expected = [
        EventName::Booted,
        EventName::Paused,
        EventName::Resumed,
        EventName::Paused,
        EventName::Reset,
        EventName::Shutdown,
    ];
    ensure(names == expected, format!("{names:?}"))?;

    // A second machine, which stops.
    api.call("vm.create", config)?;
    api.call("vm.boot", json!({}))?;
    ensure(
        api.call("vm.stop", json!({}))?["state"] == "stopped",
        "not stopped",
    )?;
    ensure(
        api.call("vm.wait", json!({}))?["exit_status"] == 34,
        "not 34",
    )?;
    guest.signal(Signal::TERM)?;
    guest.expect_exit(0)?;
    ensure(!socket.exists(), "the socket is left over")
}

fn paused_sigterm(assets: &Assets) -> Result<()> {
    let (mut guest, mut api) = start(assets.guest(PRESSED))?;
    guest.wait_for("ready")?;
    api.call("vm.pause", json!({}))?;
    guest.signal(Signal::TERM)?;
    guest.wait_for("pressed")?;
    guest.expect_exit(0)
}

/// CLI, HLT and a jump back: a machine that does nothing.
const IDLE: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfc];

/// Resets that somebody asks for are no sign of a guest that cannot start.
fn many_resets(assets: &Assets) -> Result<()> {
    const RESETS: u64 = 10;
    let dir = tempfile::tempdir().context("a directory")?;
    let kernel = dir.path().join("kernel");
    fs::write(&kernel, tiny_kernel(IDLE)).context("cannot write a kernel")?;
    let Served {
        mut api,
        guest: _server,
        ..
    } = serve(assets, None)?;
    let config = json!({"kernel": kernel, "memory": {"size": "64M"}, "serial": "null"});
    api.call("vm.create", config)?;
    api.call("vm.boot", json!({}))?;
    for _ in 0..RESETS {
        api.call("vm.reset", json!({}))?;
    }
    let info = api.call("vm.info", json!({}))?;
    ensure(info["state"] == "running" && info["resets"] == RESETS, info)
}

/// Prints the guest's clock on request.
const TELL: &str =
    "cat /sys/devices/system/clocksource/clocksource0/current_clocksource; echo ready
    while read line; do echo at $line: $(cut -d' ' -f1 /proc/uptime); echo told; done";

fn pause(assets: &Assets, cmdline: &str) -> Result<()> {
    const PAUSE: Duration = Duration::from_secs(6);
    const RUN: Duration = Duration::from_secs(1);
    let guest = assets.guest(TELL).option("--cpus", "2").cmdline(cmdline);
    let (mut guest, mut api) = start(guest)?;
    guest.wait_for("ready")?;
    let begun = Instant::now();
    guest.send("before\n")?;
    guest.wait_for("told")?;
    for round in 1..=2 {
        api.call("vm.pause", json!({}))?;
        guest.send("paused\n")?;
        thread::sleep(PAUSE / 2);
        let seen = guest.transcript().matches("at paused: ").count();
        ensure(seen == round - 1, "the guest ran while it was paused")?;
        api.call("vm.resume", json!({}))?;
        guest.wait_for_times("told", 2 * round)?;
        thread::sleep(RUN);
        guest.send("after\n")?;
        guest.wait_for_times("told", 2 * round + 1)?;
    }
    let host = begun.elapsed().as_secs_f64();
    let said = guest.transcript();
    let at = |mark: &str| -> Result<f64> {
        let line = said.lines().rfind(|line| line.starts_with(mark));
        let line = line.ok_or_else(|| Failure(said.clone()))?;
        value(line, mark)?.parse().context("a time")
    };
    let guest_time = at("at after:")? - at("at before:")?;
    let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let source = fs::read_to_string(source).context("cannot read the host's clock source")?;
    // The guest's clock has advanced as far as the host's, less the pauses. On a busy host, calls take time too.
    let most = host - PAUSE.as_secs_f64() + 0.5;
    let least = 2.0 * RUN.as_secs_f64() - 0.2;
    ensure(
        guest_time > least && guest_time < most,
        format!(
            "the guest's clock went on by {guest_time} s, the host's ({}) by {host} s:\n{said}",
            source.trim(),
        ),
    )?;
    ensure(
        api.call("vm.info", json!({}))?["state"] == "running",
        "not running",
    )
}
