//! Input reaches the guest and output comes back, through each console and backend.

use std::{
    fs::File,
    io::{Read, Write},
    os::{
        fd::AsFd,
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use fanlight_tests::{
    Context, Failure, HANG, Result, ensure,
    host_side::{guest::Assets, test_case::TestCase},
    value,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, Signal, ioctl_tiocsctty, kill_process, setsid},
    pty::{OpenptFlags, openpt, ptsname, unlockpt},
    stdio::stdin,
    termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize},
};

pub const TESTS: &[TestCase] = &[
    TestCase::new("console::serial_input_is_echoed", serial_echo),
    TestCase::new("console::virtio_console_both_ways", virtio_console),
    TestCase::new("console::a_socket_and_a_file", socket_and_file),
    TestCase::new("console::much_input_arrives_whole", much_input),
    TestCase::new(
        "console::the_terminals_size_becomes_the_guests",
        follows_size,
    ),
    TestCase::new(
        "console::ctrl_a_x_leaves_a_terminal_as_it_was",
        leaves_terminal,
    ),
    TestCase::new(
        "console::a_killed_process_leaves_a_terminal_as_it_was",
        killed,
    ),
    TestCase::new(
        "console::a_killed_process_leaves_its_session_s_terminal_as_it_was",
        killed_in_session,
    ),
];

/// Reads a line from a console and prints it.
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
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    };
    let mut said = String::new();
    let mut bytes = [0; 256];
    while !said.contains("ready") {
        let read = stream.read(&mut bytes).context("cannot read the console")?;
        ensure(read > 0, &said)?;
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
    // More than the buffers of the port and of Fanlight, so that flow control is needed throughout.
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
    let sum = Command::new("md5sum")
        .arg(&file)
        .output()
        .context("cannot run md5sum")?;
    let sum = String::from_utf8_lossy(&sum.stdout);
    let sum = sum.split_whitespace().next().unwrap_or("none");
    let said = guest.transcript();
    ensure(said.contains(&format!("sum: {sum}")), said)
}

fn follows_size(assets: &Assets) -> Result<()> {
    let guest = assets
        .guest(
            "(echo first: $(stty size); while [ \"$(stty size)\" != '47 133' ]; do sleep 0.1; done
              echo then: $(stty size)) < /dev/hvc0 > /dev/hvc0; sleep 1",
        )
        .option("--serial", "null")
        .option("--console", "stdio");
    let (command, _dir) = guest.command()?;
    let mut process = OnTerminal::start_with_size(command, Some((91, 31)))?;
    process.wait_for("first: 31 91")?;
    resize(&process.ours, (133, 47))?;
    // The kernel sends no signal: this is not the controlling terminal of Fanlight's session. A shell would send it.
    let pid = Pid::from_child(&process.process);
    kill_process(pid, Signal::WINCH).context("cannot signal")?;
    process.wait_for("then: 47 133")?;
    process.expect_exit(0)
}

fn leaves_terminal(assets: &Assets) -> Result<()> {
    run_on_terminal(assets, |process| process.leave(34))
}

fn killed(assets: &Assets) -> Result<()> {
    run_on_terminal(assets, OnTerminal::kill)
}

/// Leads the session of its terminal, as a user's shell does, and stays when the program ends.
const SHELL: &str = "exec 3<&0; \"$@\" <&3 & echo \"pid: $! end\"; wait; read -r more";

fn killed_in_session(assets: &Assets) -> Result<()> {
    let (command, _dir) = assets.guest("echo ready; sleep 1000").command()?;
    let mut shell = Command::new("sh");
    shell.args(["-c", SHELL, "sh"]).arg(command.get_program());
    shell.args(command.get_args());
    // SAFETY: setsid and ioctl are async-signal-safe, as what runs between fork and exec must be.
    unsafe {
        shell.pre_exec(|| {
            setsid()?;
            Ok(ioctl_tiocsctty(stdin())?)
        });
    }
    let mut process = OnTerminal::start(shell)?;
    process.wait_for("ready")?;
    process.wait_for_raw()?;
    let pid = value(&process.said, "pid:")?.trim_end_matches(" end");
    let pid = pid.parse().ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| Failure(process.said.clone()))?;
    kill_process(pid, Signal::KILL).context("cannot kill the process")?;
    process.ensure_restored()
}

fn run_on_terminal(assets: &Assets, end: fn(&mut OnTerminal) -> Result<()>) -> Result<()> {
    let (command, _dir) = assets.guest("echo ready; sleep 1000").command()?;
    let mut process = OnTerminal::start(command)?;
    process.wait_for("ready")?;
    process.wait_for_raw()?;
    end(&mut process)?;
    process.ensure_restored()
}

/// A program on a terminal of its own.
pub struct OnTerminal {
    process: Child,
    /// The user's end.
    ours: File,
    /// The program's end.
    theirs: File,
    before: Termios,
    said: String,
}

impl OnTerminal {
    pub fn start(command: Command) -> Result<Self> {
        Self::start_with_size(command, None)
    }

    /// Starts the program with the given columns and rows.
    fn start_with_size(mut command: Command, size: Option<(u16, u16)>) -> Result<Self> {
        let ours =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).context("cannot make a terminal")?;
        unlockpt(&ours).context("cannot unlock the terminal")?;
        let name = ptsname(&ours, Vec::new()).context("the terminal has no name")?;
        let theirs = File::options()
            .read(true)
            .write(true)
            .open(name.to_string_lossy().as_ref())
            .context("cannot open the terminal")?;
        if let Some(size) = size {
            resize(&ours, size)?;
        }
        let end = || theirs.try_clone().context("cannot duplicate a descriptor");
        let before = modes(&theirs)?;
        let process = command
            .stdin(Stdio::from(end()?))
            .stdout(Stdio::from(end()?))
            .spawn()
            .context("cannot start Fanlight")?;
        Ok(Self {
            process,
            ours: ours.into(),
            theirs,
            before,
            said: String::new(),
        })
    }

    pub fn wait_for(&mut self, text: &str) -> Result<()> {
        let mut bytes = [0; 1024];
        let patience = Timespec {
            tv_sec: 120,
            tv_nsec: 0,
        };
        while !self.said.contains(text) {
            let mut readable = [PollFd::new(&self.ours, PollFlags::IN)];
            let ready = poll(&mut readable, Some(&patience)).context("cannot wait")?;
            let hang = || format!("{HANG}: never printed {text:?}, but:\n{}", self.said);
            ensure(ready > 0, hang())?;
            let read = self.ours.read(&mut bytes).context("cannot read")?;
            self.said += &String::from_utf8_lossy(&bytes[..read]).replace('\r', "");
        }
        Ok(())
    }

    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.ours.write_all(bytes).context("cannot type")
    }

    /// Leaves by Ctrl-A x, and checks the exit status.
    pub fn leave(&mut self, status: i32) -> Result<()> {
        self.send(b"\x01x")?;
        self.expect_exit(status)
    }

    pub fn expect_exit(&mut self, expected: i32) -> Result<()> {
        let status = self.process.wait().context("cannot wait for Fanlight")?;
        let said = &self.said;
        let text = format!("ended with {status} after it printed:\n{said}");
        ensure(status.code() == Some(expected), text)
    }

    pub fn kill(&mut self) -> Result<()> {
        self.process.kill().context("cannot kill the process")?;
        self.process.wait().map(drop).context("cannot wait")
    }

    /// Waits until the terminal is raw.
    pub fn wait_for_raw(&self) -> Result<()> {
        let line = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        self.wait_for_modes(|modes| !modes.local_modes.intersects(line))
    }

    pub fn ensure_restored(&self) -> Result<()> {
        let of = |modes: &Termios| {
            (
                modes.input_modes,
                modes.output_modes,
                modes.control_modes,
                modes.local_modes,
            )
        };
        // After a kill, the guard process restores the modes with a short delay.
        self.wait_for_modes(|modes| of(modes) == of(&self.before))
    }

    fn wait_for_modes(&self, wanted: impl Fn(&Termios) -> bool) -> Result<()> {
        let start = Instant::now();
        loop {
            let now = modes(&self.theirs)?;
            if wanted(&now) {
                return Ok(());
            }
            let text = format!("before: {:?}, now: {now:?}", self.before);
            ensure(start.elapsed() < Duration::from_secs(60), text)?;
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn resize(terminal: impl AsFd, (columns, rows): (u16, u16)) -> Result<()> {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).context("cannot resize the terminal")
}

fn modes(terminal: &File) -> Result<Termios> {
    tcgetattr(terminal).context("the terminal has no modes")
}
