//! One test in a process of its own, with namespaces and a temporary folder of its own.
//!
//! The test program starts itself again for each test. So a panic, a hang or a leftover is reported for that test, and
//! mounts and interfaces go with it.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    process::{self, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    mount::{MountPropagationFlags, mount_change},
    process::{Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, wait},
    thread::{UnshareFlags, unshare_unsafe},
};

use super::process_activity;
use crate::{Context, Failure, HANG, Result, ensure};

/// No test takes this long; speed does not matter.
const LIMIT: Duration = Duration::from_secs(900);
/// Extra time after which a test that cannot report its own hang is killed.
const GRACE: Duration = Duration::from_secs(30);
/// Processes that are ending have ended by then.
const LEAVE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(50);

/// Prepares this process, which runs one test. Its mounts, and with `own_network` its interfaces, are invisible to
/// other processes. Must come before the first thread. A test that does not end is killed.
pub fn confine(own_network: bool) -> Result<()> {
    let network = if own_network {
        UnshareFlags::NEWNET
    } else {
        UnshareFlags::empty()
    };
    own_mounts(network)?;
    if own_network {
        let up = Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status();
        let up = up.context("cannot run ip")?;
        ensure(up.success(), "cannot set the loopback interface up")?;
    }
    set_child_subreaper(Some(getpid())).context("cannot adopt orphans")?;
    thread::spawn(|| {
        thread::sleep(LIMIT);
        let doing = process_activity::of(process::id());
        println!("{HANG}: the test was ended after {LIMIT:?}, with these processes:\n{doing}");
        end_descendants();
        process::exit(1);
    });
    Ok(())
}

/// Makes this process's mounts invisible to others, and gives it these other namespaces. Must come before the first
/// thread.
pub fn own_mounts(others: UnshareFlags) -> Result<()> {
    // SAFETY: mount and network namespaces change nothing that the program's memory depends on.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | others) }
        .context("cannot make namespaces; run this as root")?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).context("cannot make mounts private")
}

/// Kills all processes that this one started.
pub fn end_descendants() {
    for pid in process_activity::family(process::id()).into_iter().skip(1) {
        if let Some(pid) = Pid::from_raw(pid as i32) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Fails if this process's test has left processes or files, or interfaces other than those `before`.
pub fn nothing_is_left(before: &[String]) -> Result<()> {
    let mut left = processes_left();
    let dir = std::env::temp_dir();
    let files = fs::read_dir(&dir).context(format!("cannot list {}", dir.display()))?;
    left.extend(
        files
            .flatten()
            .map(|file| format!("file {}", file.path().display())),
    );
    let new = interfaces()?
        .into_iter()
        .filter(|name| !before.contains(name));
    left.extend(new.map(|name| format!("network interface {name}")));
    ensure(
        left.is_empty(),
        format!("the test left behind: {}", left.join(", ")),
    )
}

/// Descendants of this process that do not end.
fn processes_left() -> Vec<String> {
    let start = Instant::now();
    loop {
        // A process that has ended stays visible until its parent waits for it. For orphans, that is this process.
        while wait(WaitOptions::NOHANG).is_ok_and(|ended| ended.is_some()) {}
        let left: Vec<_> = process_activity::family(process::id())
            .into_iter()
            .skip(1)
            .map(|pid| {
                let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let words = String::from_utf8_lossy(&command).replace('\0', " ");
                format!("process {pid} ({})", words.trim())
            })
            .collect();
        if left.is_empty() || start.elapsed() > LEAVE {
            return left;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Network interfaces that this process sees.
pub fn interfaces() -> Result<Vec<String>> {
    let text = fs::read_to_string("/proc/thread-self/net/dev").context("cannot list interfaces")?;
    let names = text.lines().filter_map(|line| line.split_once(':'));
    Ok(names.map(|(name, _)| name.trim().to_owned()).collect())
}

/// Runs `command`, which runs one test, with its own temporary folder. Copies its output to `output` as it comes.
/// Returns the exit status.
pub fn run(mut command: Command, output: &mut dyn Write) -> Result<i32> {
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    // Programs that the test starts keep caches there, which are not what a test leaves behind.
    let home = tempfile::tempdir().context("cannot make a directory")?;
    let (mut reader, writer) = io::pipe().context("cannot make a pipe")?;
    let errors = writer
        .try_clone()
        .context("cannot duplicate a descriptor")?;
    command
        .env("TMPDIR", dir.path())
        .env("HOME", home.path())
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(errors);
    // SAFETY: prctl is async-signal-safe, as code between fork and exec must be.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    let mut child = command.spawn().context("cannot start a test")?;
    // The command has ends of the pipe, which would stay open.
    drop(command);
    let (said, hears) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(read @ 1..) = reader.read(&mut bytes) {
            if said.send(bytes[..read].to_vec()).is_err() {
                break;
            }
        }
    });
    let start = Instant::now();
    let mut status = None;
    loop {
        match hears.recv_timeout(POLL) {
            Ok(text) => {
                let written = output.write_all(&text).and_then(|()| output.flush());
                written.context("cannot write a test's output")?;
            }
            // A process that keeps the pipe open does not delay the result.
            Err(RecvTimeoutError::Timeout) if status.is_none() => {}
            Err(_) if status.is_some() => break,
            Err(_) => thread::sleep(POLL),
        }
        if status.is_none() {
            status = child.try_wait().context("cannot wait for a test")?;
        }
        if status.is_none() && start.elapsed() > LIMIT + GRACE {
            let _ = child.kill();
            let _ = child.wait();
            return Err(Failure(format!(
                "{HANG}: the test was killed after {:?}",
                LIMIT + GRACE
            )));
        }
    }
    Ok(status.and_then(|status| status.code()).unwrap_or(-1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> (Result<i32>, String) {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let mut output = Vec::new();
        let status = run(command, &mut output);
        (status, String::from_utf8_lossy(&output).into_owned())
    }

    #[test]
    fn output_and_status_come_back() {
        let (status, output) = shell("echo to $TMPDIR; echo error >&2; exit 3");
        assert_eq!(status.unwrap(), 3);
        assert!(output.starts_with("to /"), "{output}");
        assert!(output.ends_with("error\n"), "{output}");
    }

    #[test]
    fn a_process_that_is_left_does_not_hold_the_result_up() {
        let start = Instant::now();
        let (status, output) = shell("sleep 60 & echo $!");
        assert_eq!(status.unwrap(), 0);
        assert!(start.elapsed() < Duration::from_secs(30));
        let pid = Pid::from_raw(output.trim().parse().unwrap()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
    }
}
