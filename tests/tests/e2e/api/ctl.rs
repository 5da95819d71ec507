//! `fanlight ctl`.

use std::{fs, process::Command};

use fanlight_tests::{
    Context, Result, ensure,
    host_side::{guest::Assets, test_case::TestCase},
};
use serde_json::{Value, json};

use super::{Served, machine, serve, start};
use crate::e2e::console::OnTerminal;

pub const TESTS: &[TestCase] = &[
    TestCase::new("api::ctl_prints_results_and_errors", ctl),
    TestCase::new("api::ctl_attaches_a_terminal", attach),
];

fn ctl(assets: &Assets) -> Result<()> {
    let script = "echo ready; while [ ! -b /dev/vda ]; do sleep 0.1; done
        echo disk: $(dd if=/dev/vda bs=10 count=1 2>/dev/null); sleep 1000";
    let (mut guest, _api) = start(assets.guest(script))?;
    guest.wait_for("ready")?;
    let socket = guest.path("api");
    let run = |arguments: &[&str]| -> Result<(Option<i32>, String, String)> {
        let output = Command::new(&assets.fanlight)
            .arg("ctl")
            .args(arguments)
            .output()
            .context("cannot run ctl")?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok((
            output.status.code(),
            text(&output.stdout),
            text(&output.stderr),
        ))
    };
    let socket = socket.to_string_lossy();
    let (code, out, err) = run(&[&socket, "vm.info"])?;
    let info: Value = serde_json::from_str(&out).context(format!("{out}{err}"))?;
    ensure(code == Some(0) && info["state"] == "running", &out)?;
    let (code, out, err) = run(&[&socket, "disk.resize", "id=disk7", "size=1M"])?;
    ensure(
        code == Some(1) && out.is_empty() && err.contains("no disk \"disk7\""),
        &err,
    )?;
    let (code, _, err) = run(&[&socket, "vm.resme"])?;
    ensure(
        code == Some(1) && err.contains("did you mean vm.resume?"),
        &err,
    )?;
    let (code, out, _) = run(&[&socket, "--help"])?;
    ensure(
        code == Some(0) && out.contains("device.remove") && out.contains("Asks the guest"),
        &out,
    )?;
    let (code, out, _) = run(&[&socket, "device.add", "--help"])?;
    ensure(
        code == Some(0) && out.contains("disk") && out.contains("first free"),
        &out,
    )?;
    let (code, _, err) = run(&["/nowhere/api", "vm.info"])?;
    ensure(
        code == Some(1) && err.contains("/nowhere/api: cannot connect"),
        &err,
    )?;
    let (code, _, err) = run(&[&socket, "device.add", "disk.path=fd:77"])?;
    let closed = "descriptor 77 cannot be used: Bad file descriptor";
    ensure(code == Some(2) && err.contains(closed), &err)?;
    // Only the shell has this file open: it is deleted before the call.
    let image = guest.path("image");
    fs::write(&image, [&b"by a shell"[..], &[0; 1014]].concat()).context("an image")?;
    let line =
        r#"exec 7<>"$1" && rm "$1" && "$2" ctl "$3" device.add disk.path=fd:7 disk.serial=s"#;
    let output = Command::new("sh")
        .args(["-c", line, "sh"])
        .args([&*image, &*assets.fanlight, &*guest.path("api")])
        .output()
        .context("cannot run a shell")?;
    let err = String::from_utf8_lossy(&output.stderr);
    ensure(output.status.success(), err)?;
    guest.wait_for("disk: by a shell")?;
    let (code, ..) = run(&[&socket, "vm.stop"])?;
    ensure(code == Some(0), "vm.stop")?;
    guest.expect_exit(34)
}

/// `ctl` gives its terminal to the guest, and restores it at the end.
fn attach(assets: &Assets) -> Result<()> {
    let dir = tempfile::tempdir().context("a directory")?;
    let Served {
        guest: _serves,
        socket,
        mut api,
    } = serve(assets, None)?;
    let script = "echo ready; while read line; do echo \"heard: $line\"; done";
    api.call("vm.create", machine(assets, dir.path(), script)?)?;
    let attach = || {
        let mut command = Command::new(&assets.fanlight);
        command.arg("ctl").arg(&socket).arg("console.attach");
        OnTerminal::start(command)
    };
    let mut first = attach()?;
    // Raw mode means attached: from here on all guest output arrives.
    first.wait_for_raw()?;
    api.call("vm.boot", json!({}))?;
    first.wait_for("ready")?;
    first.send(b"one\r")?;
    first.wait_for("heard: one")?;
    first.leave(0)?;
    first.ensure_restored()?;
    // The next client gets the console, even if the server has not yet seen the first one disconnect.
    let mut second = attach()?;
    second.wait_for_raw()?;
    // Ctrl-C goes to the guest and does not end the program.
    second.send(b"two\x03three\r")?;
    second.wait_for("heard: three")?;
    second.kill()?;
    second.ensure_restored()?;
    let mut third = attach()?;
    third.wait_for_raw()?;
    // Ctrl-D ends the script, the guest, and with it the console.
    third.send(b"\x04")?;
    third.expect_exit(0)?;
    third.ensure_restored()?;
    let ended = api.call("vm.wait", json!({}))?;
    ensure(ended["ending"] == "power_off", ended)
}
