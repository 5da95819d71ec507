//! What is typed reaches the guest, and what it says comes back, by each console and backend.

use std::{
    fs::File,
    io::{Read, Write},
    os::unix::net::UnixStream,
    process::{Child, ExitStatus, Stdio},
};

use fanlight_tests::{
    Context, Failure, Result,
    guest::{Assets, GuestBuilder, ensure},
};
use rustix::{
    process::{Pid, Signal, kill_process},
    pty::{OpenptFlags, openpt, ptsname, unlockpt},
    termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize},
};
use tempfile::TempDir;

use crate::Test;

pub const TESTS: &[(&str, Test)] = &[
    ("console::serial_input_is_echoed", serial_echo),
    ("console::virtio_console_both_ways", virtio_console),
    ("console::a_socket_and_a_file", socket_and_file),
    ("console::much_input_arrives_whole", much_input),
    (
        "console::the_terminals_size_becomes_the_guests",
        follows_size,
    ),
    (
        "console::ctrl_a_x_leaves_a_terminal_as_it_was",
        leaves_by_keys,
    ),
    (
        "console::a_killed_process_leaves_a_terminal_as_it_was",
        |assets| {
            leaves_terminal(assets, |process, _| {
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

fn leaves_by_keys(assets: &Assets) -> Result<()> {
    let status = leaves_terminal(assets, |_, terminal| {
        terminal.write_all(b"\x01x").context("cannot type")
    })?;
    ensure(status.code() == Some(34), format!("ended by {status}"))
}

/// A terminal of our own, with Fanlight on it.
struct Terminal {
    /// Where a user types and reads.
    ours: File,
    /// Where Fanlight does.
    theirs: File,
    /// What was read so far.
    said: String,
}

impl Terminal {
    fn open() -> Result<Self> {
        let ours =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).context("cannot make a terminal")?;
        unlockpt(&ours).context("cannot unlock the terminal")?;
        let name = ptsname(&ours, Vec::new()).context("the terminal has no name")?;
        let theirs = File::options()
            .read(true)
            .write(true)
            .open(name.to_string_lossy().as_ref())
            .context("cannot open the terminal")?;
        Ok(Self {
            ours: File::from(ours),
            theirs,
            said: String::new(),
        })
    }

    /// Starts the guest with the terminal as its own.
    fn spawn(&self, guest: GuestBuilder) -> Result<(Child, TempDir)> {
        let end_of = || {
            self.theirs
                .try_clone()
                .context("cannot duplicate a descriptor")
        };
        let (mut command, dir) = guest.command()?;
        let process = command
            .stdin(Stdio::from(end_of()?))
            .stdout(Stdio::from(end_of()?))
            .spawn()
            .context("cannot start Fanlight")?;
        Ok((process, dir))
    }

    fn wait_for(&mut self, text: &str) -> Result<()> {
        let mut bytes = [0; 1024];
        while !self.said.contains(text) {
            let read = self
                .ours
                .read(&mut bytes)
                .context("cannot read the terminal")?;
            self.said += &String::from_utf8_lossy(&bytes[..read]);
        }
        Ok(())
    }

    fn modes(&self) -> Result<Termios> {
        tcgetattr(&self.theirs).context("the terminal has no modes")
    }

    fn resize(&self, ws_col: u16, ws_row: u16) -> Result<()> {
        let size = Winsize {
            ws_row,
            ws_col,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.ours, size).context("cannot resize the terminal")
    }
}

fn follows_size(assets: &Assets) -> Result<()> {
    let mut terminal = Terminal::open()?;
    terminal.resize(91, 31)?;
    let guest = assets
        .guest(
            "(echo first: $(stty size); while [ \"$(stty size)\" != '47 133' ]; do sleep 0.1; done
              echo then: $(stty size)) < /dev/hvc0 > /dev/hvc0; sleep 1",
        )
        .option("--serial", "null")
        .option("--console", "stdio");
    let (mut process, _dir) = terminal.spawn(guest)?;
    terminal.wait_for("first: 31 91")?;
    terminal.resize(133, 47)?;
    // The terminal is not the controlling one of Fanlight's session: the shell that would be is this test.
    kill_process(Pid::from_child(&process), Signal::WINCH).context("cannot signal")?;
    terminal.wait_for("then: 47 133")?;
    let status = process.wait().context("cannot wait for Fanlight")?;
    ensure(status.success(), format!("ended by {status}"))
}

/// Runs a guest on a terminal, has `end` end it, and compares the terminal's modes.
fn leaves_terminal(
    assets: &Assets,
    end: impl FnOnce(&mut Child, &mut File) -> Result<()>,
) -> Result<ExitStatus> {
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
    let mut terminal = Terminal::open()?;
    let before = terminal.modes()?;
    let (mut process, _dir) = terminal.spawn(assets.guest("echo ready; sleep 1000"))?;
    terminal.wait_for("ready")?;
    let during = terminal.modes()?;
    ensure(
        !during
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG),
        "the terminal is not raw",
    )?;
    end(&mut process, &mut terminal.ours)?;
    let status = process.wait().context("cannot wait for Fanlight")?;
    // After a kill the guard process restores, a moment later.
    for _ in 0..500 {
        if same(&before, &terminal.modes()?) {
            return Ok(status);
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    Err(Failure(format!(
        "before: {before:?}, after: {:?}",
        terminal.modes()?
    )))
}
