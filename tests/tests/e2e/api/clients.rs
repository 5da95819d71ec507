//! API clients: many at once, a slow one, and the sessions of the protocol page.

use std::{fs, io::Write, os::unix::net::UnixStream, process::Command, thread};

use fanlight_api::client::Client;
use fanlight_tests::{
    Context, Failure, Result, ensure,
    host_side::{guest::Assets, test_case::TestCase},
};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{Served, serve, start};

pub const TESTS: &[TestCase] = &[
    TestCase::new("api::sixty_four_clients", many_clients),
    TestCase::new("api::the_documented_session_with_socat", |assets| {
        session(assets, "sh", "sh")
    }),
    TestCase::new("api::the_documented_session_with_python", |assets| {
        session(assets, "python", "python3")
    }),
];

fn many_clients(assets: &Assets) -> Result<()> {
    const CLIENTS: usize = 64;
    const CALLS: usize = 40;
    let script =
        "echo ready; while :; do dd if=/dev/hwrng of=/dev/null bs=1k count=8 2>/dev/null; done";
    let (mut guest, mut api) = start(assets.guest(script))?;
    guest.wait_for("ready")?;
    let socket = guest.path("api");
    // One client sends half a line and one does not read, until the test ends.
    let mut half = UnixStream::connect(&socket).context("cannot connect")?;
    half.write_all(b"{\"jsonrpc\"")
        .context("cannot send half a line")?;
    let deaf = UnixStream::connect(&socket).context("cannot connect")?;
    let flood = thread::spawn(move || {
        let line = b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"api.schema\"}\n";
        while (&deaf).write_all(line).is_ok() {}
    });
    let calls: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let socket = socket.clone();
            thread::spawn(move || -> Result<()> {
                let mut client = Client::connect(&socket).context("cannot connect")?;
                for _ in 0..CALLS {
                    for method in ["vm.info", "vm.stats"] {
                        client.call_json(method, &json!({}), &[]).context(method)?;
                    }
                }
                Ok(())
            })
        })
        .collect();
    for call in calls {
        call.join().map_err(|_| Failure("panicked".into()))??;
    }
    flood.join().map_err(|_| Failure("panicked".into()))?;
    guest.wait_for("does not read its answers: disconnected")?;
    drop(half);
    ensure(
        api.call("vm.info", json!({}))?["state"] == "running",
        "not running",
    )
}

/// The page that describes the protocol.
const PROTOCOL: &str = include_str!("../../../../docs/src/guide/protocol.md");

/// Runs the page's block of code in `language` with `program`.
fn session(assets: &Assets, language: &str, program: &str) -> Result<()> {
    let (_, code) = PROTOCOL
        .split_once(&format!("```{language}\n"))
        .ok_or_else(|| Failure(format!("no block of {language}")))?;
    let (code, _) = code.split_once("```").unwrap_or((code, ""));
    let dir = tempfile::tempdir().context("a directory")?;
    assets.clients.scripts(dir.path())?;
    let script = dir.path().join("session");
    fs::write(&script, code).context("cannot write the session")?;
    let initrd = dir.path().join("initrd");
    fs::write(&initrd, assets.initrd("")?).context("cannot write the guest's root")?;
    let Served {
        mut guest, socket, ..
    } = serve(assets, None)?;
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{}:{path}", dir.path().display());
    let output = Command::new("sh")
        .args(["-c", &format!("exec {program} {}", script.display())])
        .env("PATH", &path)
        .env("S", &socket)
        .env("KERNEL", &assets.stock.image)
        .env("INITRD", &initrd)
        .output();
    let output = output.context(program)?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure(output.status.success(), format!("{said}{errors}"))?;
    if language == "sh" {
        let answers: Vec<Value> = said
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()
            .context(&said)?;
        let result = |id: u64| {
            let answer = answers.iter().find(|answer| answer["id"] == id);
            answer
                .map(|answer| answer["result"].clone())
                .unwrap_or_default()
        };
        ensure(result(1)["api"] == "1.0", &said)?;
        ensure(result(3)["state"] == "running", &said)?;
        ensure(result(4)["ending"] == "power_off", &said)?;
    } else {
        let expected = "version 1.0\nevent booted\nevent shutdown\nending power_off\n";
        ensure(said == expected, format!("{said}{errors}"))?;
    }
    guest.signal(Signal::TERM)?;
    guest.expect_exit(0)
}
