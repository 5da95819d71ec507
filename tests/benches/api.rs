//! Round trips a second and their 99th percentile on one connection to a machine whose guest is busy:
//! Fanlight's `vm.info` beside QEMU's QMP `query-status`, in one run, in turn. Prints a
//! table of the book.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::{net::UnixStream, process::CommandExt},
    path::Path,
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use fanlight_tests::{
    Context, Failure, Result,
    host_side::{
        bench::{self, CMDLINE, Cell, Paths, Table, Vmm},
        guest::Guest,
    },
    nested_host::{Archive, Busybox, Cache, guest_archive},
};
use rustix::process::Signal;

/// Round trips in a round, after as many to warm up as a tenth of them.
const CALLS: usize = 3000;
/// What the guest says before it is busy for good.
const MARK: &str = "measure: busy";

fn main() -> ExitCode {
    bench::run(initrd, measure)
}

fn initrd(cache: &Cache) -> Result<Vec<u8>> {
    let mut initrd = guest_archive(&Busybox::get(cache)?, None, None)?;
    let mut more = Archive::default();
    let script = format!("#!/bin/sh\necho '{MARK}'\nwhile :; do :; done\n");
    more.file("measure", script.as_bytes());
    initrd.extend(more.finish());
    Ok(initrd)
}

const NAMES: [&str; 2] = ["Fanlight, `vm.info`", "QEMU, QMP `query-status`"];

/// What one round showed.
#[derive(Clone, Copy, Debug)]
struct Sample {
    /// Round trips a second.
    rate: f64,
    /// 99th percentile, in microseconds.
    p99: f64,
}

fn measure(paths: &Paths, rounds: usize) -> Result<()> {
    let samples = bench::in_turn(rounds, &NAMES, |index| measure_one(Vmm::BOTH[index], paths));
    let mut table = Table::new(&NAMES, [0, 1]);
    let rates = Cell::row(&samples, |sample| Some(sample.rate));
    table.row("round trips a second", "", 0, rates);
    let percentiles = Cell::row(&samples, |sample| Some(sample.p99));
    table.row("99th percentile", "µs", 0, percentiles);
    println!("{}", table.text());
    bench::all_came_to_their_end(&NAMES, &samples)
}

fn measure_one(vmm: Vmm, paths: &Paths) -> Result<Sample> {
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let socket = dir.path().join("socket");
    let mut command = command(vmm, paths, &socket);
    command.stderr(Stdio::piped()).process_group(0);
    let mut guest = Guest::spawn(command, dir)?;
    guest.wait_for(MARK)?;
    let mut connection = Connection::open(vmm, &socket)?;
    for _ in 0..CALLS / 10 {
        connection.round_trip()?;
    }
    let mut times = Vec::with_capacity(CALLS);
    let begun = Instant::now();
    for _ in 0..CALLS {
        let begun = Instant::now();
        connection.round_trip()?;
        times.push(begun.elapsed());
    }
    let rate = CALLS as f64 / begun.elapsed().as_secs_f64();
    times.sort_unstable();
    let p99 = times
        .get(CALLS * 99 / 100)
        .copied()
        .unwrap_or(Duration::MAX);
    guest.signal(Signal::KILL)?;
    Ok(Sample {
        rate,
        p99: p99.as_secs_f64() * 1e6,
    })
}

fn command(vmm: Vmm, paths: &Paths, socket: &Path) -> Command {
    match vmm {
        Vmm::Fanlight => {
            let mut command = Command::new(paths.fanlight());
            command
                .args(["run", "--cpus", "1", "--memory", "256M", "--kernel"])
                .arg(paths.kernel())
                .arg("--initrd")
                .arg(paths.initrd())
                .args(["--cmdline", CMDLINE, "--api-socket"])
                .arg(socket);
            command
        }
        Vmm::Qemu => {
            let mut command = paths.emulator.command("qemu-system-x86_64");
            command
                .args(["-M", "q35", "-accel", "kvm", "-cpu", "host", "-m", "256M"])
                .args(["-nodefaults", "-no-user-config", "-display", "none"])
                .args(["-serial", "stdio", "-no-reboot", "-kernel"])
                .arg(paths.kernel())
                .arg("-initrd")
                .arg(paths.initrd())
                .args(["-append", CMDLINE, "-qmp"])
                .arg(format!("unix:{},server=on,wait=off", socket.display()));
            command
        }
    }
}

/// A connection that asks the same over and over. Both protocols are lines of JSON; neither answer is
/// looked into further than that it is one.
struct Connection {
    writer: UnixStream,
    reader: BufReader<UnixStream>,
    request: &'static [u8],
    line: Vec<u8>,
}

impl Connection {
    fn open(vmm: Vmm, socket: &Path) -> Result<Self> {
        let writer = UnixStream::connect(socket).context("cannot connect")?;
        let reader = BufReader::new(writer.try_clone().context("cannot duplicate a socket")?);
        let mut connection = Self {
            writer,
            reader,
            request: b"",
            line: Vec::new(),
        };
        match vmm {
            Vmm::Fanlight => {
                connection.request = b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"vm.info\"}\n";
            }
            Vmm::Qemu => {
                // The greeting, then the end of negotiation.
                connection.read()?;
                connection.request = b"{\"execute\":\"qmp_capabilities\"}\n";
                connection.round_trip()?;
                connection.request = b"{\"execute\":\"query-status\"}\n";
            }
        }
        Ok(connection)
    }

    fn read(&mut self) -> Result<()> {
        self.line.clear();
        let read = self.reader.read_until(b'\n', &mut self.line);
        match read.context("cannot read")? {
            0 => Err(Failure("the connection ended".into())),
            _ => Ok(()),
        }
    }

    fn round_trip(&mut self) -> Result<()> {
        self.writer
            .write_all(self.request)
            .context("cannot write")?;
        loop {
            self.read()?;
            // QMP's events come in between.
            let text = String::from_utf8_lossy(&self.line);
            if text.contains("\"error\"") {
                return Err(Failure(text.into_owned()));
            }
            if text.contains("\"return\"") || text.contains("\"result\"") {
                return Ok(());
            }
        }
    }
}
