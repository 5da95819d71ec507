//! What is typed reaches the guest, and what it says comes back, by each console and backend.

use std::{
    fs::File,
    io::{Read, Write},
    os::unix::net::UnixStream,
    process::{Child, ExitStatus, Stdio},
};

use fanlight_tests::{
    Context, Failure, Result,
    guest::{Assets, ensure},
};
use rustix::{
    pty::{OpenptFlags, openpt, ptsname, unlockpt},
    termios::{LocalModes, Termios, tcgetattr},
};

use crate::Test;

pub const TESTS: &[(&str, Test)] = &[
    ("console::serial_input_is_echoed", serial_echo),
    ("console::virtio_console_both_ways", virtio_console),
    ("console::a_socket_and_a_file", socket_and_file),
    ("console::much_input_arrives_whole", much_input),
    (
        "console::ctrl_a_x_leaves_a_terminal_as_it_was",
        leaves_terminal,
    ),
    (
        "console::a_killed_process_leaves_a_terminal_as_it_was",
        |assets| {
            terminal(assets, |process, _| {
                process.kill().context("cannot kill the process")
            })
            .map(drop)
        },
    ),
];

/// Reads a line from a console and says it back.
const ECHO: &str = "echo ready; read line; echo \"heard: $line\"";

fn serial_echo(assets: &Assets) -> Result<()> {
    let mut guest = assets.guest(ECHO).start()?;
    guest.wait_for("ready")?;
    guest.send("a line for the guest\n")?;
    guest.wait_for("heard: a line for the guest")?;
    guest.expect_exit(0)
}

fn virtio_console(assets: &Assets) -> Result<()> {
    let mut guest = assets
        .guest("(echo ready; read line; echo \"heard: $line\") < /dev/hvc0 > /dev/hvc0; sleep 1")
        .option("--serial", "null")
        .option("--console", "stdio")
        .start()?;
    guest.wait_for("ready")?;
    guest.send("over virtio\n")?;
    guest.wait_for("heard: over virtio")?;
    guest.expect_exit(0)
}

fn socket_and_file(assets: &Assets) -> Result<()> {
    let guest = assets.guest("(echo ready; read line; echo \"heard: $line\") < /dev/hvc0 > /dev/hvc0; sleep 1; echo log line");
    let (socket, log) = (guest.path("socket"), guest.path("log"));
    let mut guest = guest
        .option("--serial", format!("file={}", log.display()))
        .option("--console", format!("socket={}", socket.display()))
        .start()?;
    let mut stream = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(20)),
        }
    };
    let mut said = String::new();
    let mut bytes = [0; 256];
    while !said.contains("ready") {
        let read = stream.read(&mut bytes).context("cannot read the console")?;
        said += &String::from_utf8_lossy(&bytes[..read]);
    }
    stream.write_all(b"by socket\n").context("cannot type")?;
    while !said.contains("heard: by socket") {
        let read = stream.read(&mut bytes).context("cannot read the console")?;
        ensure(read > 0, &said)?;
        said += &String::from_utf8_lossy(&bytes[..read]);
    }
    guest.expect_exit(0)?;
    let log = std::fs::read_to_string(&log).context("cannot read the log")?;
    ensure(log.contains("log line"), &log)?;
    ensure(!socket.exists(), "the socket is left over")
}

fn much_input(assets: &Assets) -> Result<()> {
    // More than the port's buffer and than ours, so that flow control is needed all the way.
    let text: String = (0..400)
        .map(|n| format!("line {n} of the input\n"))
        .collect();
    let mut guest = assets
        .guest("stty -echo; echo ready; head -n 400 > /tmp/x; echo sum: $(md5sum < /tmp/x)")
        .start()?;
    guest.wait_for("ready")?;
    for line in text.split_inclusive('\n') {
        guest.send(line)?;
    }
    guest.expect_exit(0)?;
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let file = dir.path().join("x");
    std::fs::write(&file, &text).context("cannot write")?;
    let sum = std::process::Command::new("md5sum")
        .arg(&file)
        .output()
        .context("cannot run md5sum")?;
    let sum = String::from_utf8_lossy(&sum.stdout);
    let sum = sum.split_whitespace().next().unwrap_or("none");
    let said = guest.transcript();
    ensure(said.contains(&format!("sum: {sum}")), said)
}

fn leaves_terminal(assets: &Assets) -> Result<()> {
    let status = terminal(assets, |_, terminal| {
        terminal.write_all(b"\x01x").context("cannot type")
    })?;
    ensure(status.code() == Some(34), format!("ended by {status}"))
}

/// Runs a guest on a terminal, has `end` end it, and compares the terminal's modes.
fn terminal(
    assets: &Assets,
    end: impl FnOnce(&mut Child, &mut File) -> Result<()>,
) -> Result<ExitStatus> {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).context("cannot make a terminal")?;
    unlockpt(&ours).context("cannot unlock the terminal")?;
    let name = ptsname(&ours, Vec::new()).context("the terminal has no name")?;
    let theirs = File::options()
        .read(true)
        .write(true)
        .open(name.to_string_lossy().as_ref())
        .context("cannot open the terminal")?;
    let mut ours = File::from(ours);
    let modes = || tcgetattr(&theirs).context("the terminal has no modes");
    let same = |a: &Termios, b: &Termios| {
        (
            a.input_modes,
            a.output_modes,
            a.control_modes,
            a.local_modes,
        ) == (
            b.input_modes,
            b.output_modes,
            b.control_modes,
            b.local_modes,
        )
    };
    let before = modes()?;
    let end_of = || theirs.try_clone().context("cannot duplicate a descriptor");
    let (mut command, _dir) = assets.guest("echo ready; sleep 1000").command()?;
    let mut process = command
        .stdin(Stdio::from(end_of()?))
        .stdout(Stdio::from(end_of()?))
        .spawn()
        .context("cannot start Fanlight")?;
    let mut said = Vec::new();
    let mut bytes = [0; 1024];
    while !String::from_utf8_lossy(&said).contains("ready") {
        let read = ours.read(&mut bytes).context("cannot read the terminal")?;
        said.extend_from_slice(&bytes[..read]);
    }
    let during = modes()?;
    ensure(
        !during
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG),
        "the terminal is not raw",
    )?;
    end(&mut process, &mut ours)?;
    let status = process.wait().context("cannot wait for Fanlight")?;
    // After a kill the guard process restores, a moment later.
    for _ in 0..500 {
        if same(&before, &modes()?) {
            return Ok(status);
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    Err(Failure(format!(
        "before: {before:?}, after: {:?}",
        modes()?
    )))
}
