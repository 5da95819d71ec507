//! A guest in this process: the machine as a library, whose devices a test has in its hands.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use fanlight::{
    graphics::Graphics,
    machine::{Callbacks, Machine},
    resources::Resources,
};
use fanlight_api::{CharBackend, VmConfig, socket::Descriptors};
use fanlight_devices::{error_line, legacy::GuestRequest};
use tempfile::TempDir;

use crate::{Context, Failure, Result, guest::PATIENCE};

/// A guest that runs in this process. Dropping stops it.
pub struct Embedded {
    machine: Machine,
    resources: Resources,
    ended: Receiver<String>,
    console: PathBuf,
    dir: TempDir,
}

/// Looks again and again, without measuring anything.
const PAUSE: Duration = Duration::from_millis(20);

impl Embedded {
    /// Starts the machine. Its console is a file in `dir`.
    pub(crate) fn start(config: VmConfig, dir: TempDir) -> Result<Self> {
        let console = dir.path().join("console");
        let config = VmConfig {
            serial: CharBackend::File(console.clone()),
            ..config
        };
        let line = |error: &dyn std::error::Error| Failure(error_line(error));
        let resources =
            Resources::open(config, &Descriptors::Inherited).map_err(|error| line(&error))?;
        let (sender, ended) = mpsc::channel();
        let callbacks = callbacks(sender);
        let mut machine = Machine::build(&resources, callbacks).map_err(|error| line(&error))?;
        machine.start().map_err(|error| line(&error))?;
        Ok(Self {
            machine,
            resources,
            ended,
            console,
            dir,
        })
    }

    /// Display and input devices of a guest that was given a GPU.
    pub fn graphics(&self) -> Result<&Graphics> {
        let graphics = self.resources.graphics.as_ref();
        graphics.ok_or_else(|| Failure("the guest has no GPU".into()))
    }

    /// Everything that the guest said on its console.
    pub fn transcript(&self) -> String {
        let bytes = fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// Waits until the guest has said `text`.
    pub fn wait_for(&self, text: &str) -> Result<()> {
        self.wait_until(&format!("the guest says {text:?}"), || {
            self.transcript().contains(text)
        })
    }

    /// Waits until something is so.
    pub fn wait_until(&self, what: &str, condition: impl Fn() -> bool) -> Result<()> {
        let start = Instant::now();
        loop {
            let ended = self.ended.try_recv();
            if condition() {
                return Ok(());
            }
            let why = match ended {
                Ok(why) => why,
                Err(_) if start.elapsed() > PATIENCE => "patience ended".to_owned(),
                Err(_) => {
                    thread::sleep(PAUSE);
                    continue;
                }
            };
            let said = self.transcript();
            return Err(Failure(format!("{why} before {what}; it said:\n{said}")));
        }
    }

    /// Types a line on the guest's console.
    pub fn type_line(&self, line: &str) -> Result<()> {
        let mut bytes = [line.as_bytes(), b"\n"].concat();
        let start = Instant::now();
        while !bytes.is_empty() && start.elapsed() < PATIENCE {
            let taken = self.machine.serial.input(&bytes);
            bytes.drain(..taken);
            thread::sleep(PAUSE);
        }
        if bytes.is_empty() {
            Ok(())
        } else {
            Err(Failure("the guest does not read".into()))
        }
    }

    /// A path in the guest's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn callbacks(sender: Sender<String>) -> Callbacks {
    let failures = sender.clone();
    Callbacks {
        requests: Arc::new(move |request: GuestRequest| {
            let _ = sender.send(format!("the guest asked for {request:?}"));
        }),
        failures: Arc::new(move |error| {
            let _ = failures.send(error_line(&error));
        }),
        ejected: Arc::new(|_| ()),
        device_failed: Arc::new(|_| ()),
    }
}

/// An image of zeroes for a disk.
pub fn zeroes(path: &Path, size: u64) -> Result<()> {
    fs::File::create(path)
        .and_then(|file| file.set_len(size))
        .context("cannot make a disk")
}
