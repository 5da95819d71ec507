//! Bytes cross a tap and vsock in both directions, and each is checked.

use std::process::Command;

use fanlight_tests::{
    Context, Result,
    common::echo::{self, Address},
    ensure,
    host_side::{guest::Assets, process_activity, test_case::TestCase},
};

pub const TESTS: &[TestCase] = &[
    TestCase::new("network::tcp_through_vhost", |assets| {
        tcp(assets, "tapv", 71, "on")
    }),
    TestCase::new("network::tcp_through_our_threads", |assets| {
        tcp(assets, "tapu", 72, "off")
    }),
    TestCase::new("network::vsock_both_ways", vsock),
];

const BYTES: u64 = 8 << 20;

/// Runs `ip` on the host.
pub fn ip(arguments: &str) -> Result<()> {
    let status = Command::new("ip")
        .args(arguments.split_whitespace())
        .status()
        .context("cannot run ip")?;
    ensure(status.success(), format!("ip {arguments}: {status}"))
}

fn tcp(assets: &Assets, tap: &str, net: u8, vhost: &str) -> Result<()> {
    let mut guest = assets
        .guest(&format!(
            "ip addr add 10.0.{net}.2/24 dev eth0; ip link set eth0 up; ip link set lo up
             echo mac: $(cat /sys/class/net/eth0/address); echo ready
             guest-agent call tcp:10.0.{net}.1:5000 {BYTES}
             guest-agent serve tcp:0.0.0.0:5001"
        ))
        .option(
            "--net",
            format!("tap={tap},vhost={vhost},mac=52:54:00:00:00:{net}"),
        )
        .start()?;
    // Fanlight created the interface: it did not exist before.
    guest.wait_for("ready")?;
    ip(&format!("addr add 10.0.{net}.1/24 dev {tap}"))?;
    ip(&format!("link set {tap} up"))?;
    let served =
        guest.converse(move || echo::serve(&Address::Tcp(format!("10.0.{net}.1:5000"))))?;
    ensure(served == BYTES, format!("{served} bytes came"))?;
    check_threads(guest.pid(), vhost == "on")?;
    guest.converse(move || echo::call(&Address::Tcp(format!("10.0.{net}.2:5001")), BYTES))?;
    guest.expect_exit(0)?;
    let said = guest.transcript();
    ensure(said.contains(&format!("mac: 52:54:00:00:00:{net}")), &said)?;
    went_both_ways(&said)
}

/// Either a thread of the host's kernel moves frames, or threads of the VMM do.
fn check_threads(pid: u32, vhost: bool) -> Result<()> {
    let threads = process_activity::waits(pid);
    let has = |start: &str| threads.iter().any(|(name, _)| name.starts_with(start));
    ensure(
        [has("vhost-"), has("net-in"), has("net-out")] == [vhost, !vhost, !vhost],
        format!("{threads:?}"),
    )
}

fn vsock(assets: &Assets) -> Result<()> {
    const CID: u32 = 42;
    let mut guest = assets
        .guest(&format!(
            "guest-agent call vsock:2:6000 {BYTES}; guest-agent serve vsock:{}:6001",
            u32::MAX
        ))
        .option("--vsock", format!("cid={CID}"))
        .start()?;
    let served = guest.converse(|| echo::serve(&Address::Vsock(u32::MAX, 6000)))?;
    ensure(served == BYTES, format!("{served} bytes came"))?;
    guest.converse(|| echo::call(&Address::Vsock(CID, 6001), BYTES))?;
    guest.expect_exit(0)?;
    let said = guest.transcript();
    went_both_ways(&said)
}

fn went_both_ways(said: &str) -> Result<()> {
    for verb in ["called with", "served"] {
        ensure(said.contains(&format!("agent: {verb} {BYTES} bytes")), said)?;
    }
    Ok(())
}
