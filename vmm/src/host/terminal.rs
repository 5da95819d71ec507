//! The user's terminal in raw mode, restored however the process ends.
//!
//! Dropping [`RawTerminal`] restores it, and so does a panic. If the process is killed, a guard process restores it:
//! it holds one end of a socket and acts when the other end closes.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command, Stdio},
};

use fanlight_devices::sync::Mutex;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// The hidden subcommand that runs [`guard`].
pub const GUARD_COMMAND: &str = "terminal-guard";

/// The terminal's mode before, for the panic hook.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// The terminal is raw while this lives.
pub struct RawTerminal {
    /// When it closes, the guard restores the terminal and ends.
    alive: Option<UnixStream>,
    guard: Child,
}

impl RawTerminal {
    /// Makes the terminal on standard input raw. `None` if there is none.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = rustix::stdio::stdin();
        let Ok(before) = tcgetattr(stdin) else {
            return Ok(None);
        };
        let (mut alive, guards_end) = UnixStream::pair()?;
        let terminal: OwnedFd = stdin.try_clone_to_owned()?;
        let guard = Command::new("/proc/self/exe")
            .arg(GUARD_COMMAND)
            .stdin(Stdio::from(OwnedFd::from(guards_end)))
            .stdout(Stdio::from(terminal))
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        // The guard answers when it has read the old mode.
        alive.read_exact(&mut [0])?;

        *BEFORE.lock() = Some(before.clone());
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            hook(info);
        }));
        let mut raw = before;
        raw.make_raw();
        tcsetattr(stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self {
            alive: Some(alive),
            guard,
        }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
        self.alive = None;
        let _ = self.guard.wait();
    }
}

fn restore() {
    let before = BEFORE.lock().take();
    if let Some(before) = before {
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &before);
    }
}

/// The guard process: standard input is the socket, standard output the terminal.
pub fn guard() -> io::Result<()> {
    // A background process that changes the terminal's mode gets SIGTTOU, unless that is blocked.
    vmm_sys_util::signal::block_signal(libc::SIGTTOU)
        .map_err(|e| io::Error::other(e.to_string()))?;
    let (socket, terminal) = (rustix::stdio::stdin(), rustix::stdio::stdout());
    let mut socket = UnixStream::from(socket.try_clone_to_owned()?);
    let before = tcgetattr(terminal.as_fd())?;
    socket.write_all(&[0])?;
    let _ = socket.read(&mut [0]);
    Ok(tcsetattr(terminal, OptionalActions::Now, &before)?)
}
