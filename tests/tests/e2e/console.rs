//! What is typed reaches the guest, and what it says comes back, by each console and backend.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
};

use fanlight_tests::{
    Context, Result,
    guest::{Assets, ensure},
};

use crate::Test;

pub const TESTS: &[(&str, Test)] = &[
    ("console::serial_input_is_echoed", serial_echo),
    ("console::virtio_console_both_ways", virtio_console),
    ("console::a_socket_and_a_file", socket_and_file),
    ("console::much_input_arrives_whole", much_input),
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
