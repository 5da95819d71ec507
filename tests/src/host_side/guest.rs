//! A test's guest: built from parts, started, controlled, and checked for how it ended.

use std::{
    ffi::OsStr,
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{
    Context, Failure, HANG, Result, ensure,
    host_side::{kvm_host, process_activity},
    nested_host::{
        ApiClients, Archive, BuiltKernel, DebianPrograms, Drivers, Emulator, GraphicsStack,
        StockKernel,
    },
};

/// A guest that is silent for this long hangs; speed does not matter.
pub(crate) const PATIENCE: Duration = Duration::from_secs(240);
/// Generous time for a process and its pipes to end.
const LEAVE: Duration = Duration::from_secs(5);

/// A guest script that prints "ready" once a press of the power button cannot be lost, and "pressed" after one. The
/// input device queues events only for open files, so the script opens it before "ready".
pub const PRESSED: &str =
    "until set -- $(grep -l 'Power Button' /sys/class/input/event*/device/name 2>/dev/null)
        [ $# -gt 0 ]; do sleep 0.1; done
    event=${1#/sys/class/input/}; exec 3< /dev/input/${event%%/*}
    echo ready; dd bs=24 count=1 <&3 > /dev/null 2>&1; echo pressed";

/// Kernel parameters that the nested host needs: its clock ticks periodically, as L1's does. The emulator sometimes
/// loses a one-shot timer, after which a tickless guest sleeps forever.
pub fn nested_host_clock() -> &'static str {
    if std::env::var_os(kvm_host::IN_NESTED_HOST).is_some() {
        " nohz=off highres=off lapic=notscdeadline"
    } else {
        ""
    }
}

/// Files that guests are built from.
#[derive(Clone, Debug)]
pub struct Assets {
    /// The program under test.
    pub fanlight: PathBuf,
    /// Debian's kernel.
    pub stock: StockKernel,
    /// Drivers of that kernel.
    pub drivers: Drivers,
    /// The nested host's kernel.
    pub built_kernel: BuiltKernel,
    /// The module for the nested host's kernel that exports dma-bufs.
    pub guest_module: PathBuf,
    /// QEMU and its tools.
    pub emulator: Emulator,
    /// Programs that speak to the control API.
    pub clients: ApiClients,
    /// Wayland compositors.
    pub compositors: DebianPrograms,
    /// DRM clients and a judge of EDIDs.
    pub graphics_tools: DebianPrograms,
    /// Mesa and virglrenderer.
    pub graphics: GraphicsStack,
    /// The same with an older virglrenderer on the host.
    pub older_graphics: GraphicsStack,
    /// The guest's root without its test.
    pub guest_archive: PathBuf,
}

/// Which kernel a guest boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestKernel {
    /// Debian's bzImage.
    Stock,
    /// The nested host's vmlinux, through PVH.
    Vmlinux,
}

/// A guest to be started.
#[derive(Debug)]
pub struct GuestBuilder {
    assets: Assets,
    dir: TempDir,
    kernel: GuestKernel,
    cmdline: String,
    script: String,
    arguments: Vec<String>,
    archive: Archive,
    graphics: Option<GraphicsStack>,
}

impl Assets {
    /// A guest's root that runs the shell script `script`.
    pub fn initrd(&self, script: &str) -> Result<Vec<u8>> {
        self.guest(script).initrd()
    }

    /// A guest with one vCPU, 256 MiB and Debian's kernel that runs the shell script `script`.
    pub fn guest(&self, script: &str) -> GuestBuilder {
        GuestBuilder {
            assets: self.clone(),
            dir: tempfile::tempdir().expect("a directory for the guest"),
            kernel: GuestKernel::Stock,
            cmdline: format!("console=ttyS0 panic=-1 loglevel=4{}", nested_host_clock()),
            script: script.into(),
            arguments: ["--memory", "256M"].map(str::to_owned).into(),
            archive: Archive::default(),
            graphics: None,
        }
    }
}

impl GuestBuilder {
    /// Runs Fanlight on a host root with Mesa and virglrenderer, and gives the guest the same root as its first disk.
    pub fn with_graphics(self) -> Result<Self> {
        let stack = self.assets.graphics.clone();
        self.with_graphics_of(stack)
    }

    /// The same with the given stack.
    pub fn with_graphics_of(mut self, stack: GraphicsStack) -> Result<Self> {
        let program = self.assets.fanlight.parent().map(Path::to_path_buf);
        let cache = stack.root.parent().map(Path::to_path_buf);
        stack.show(program.into_iter().chain(cache))?;
        let disk = format!("path={},format=raw,readonly=on", stack.image.display());
        self.graphics = Some(stack);
        Ok(self.option("--disk", disk))
    }

    /// Boots another kernel.
    pub fn kernel(mut self, kernel: GuestKernel) -> Self {
        self.kernel = kernel;
        self
    }

    /// Adds to the kernel's command line.
    pub fn cmdline(mut self, more: &str) -> Self {
        self.cmdline += " ";
        self.cmdline += more;
        self
    }

    /// Adds an option of `fanlight run`. A second value replaces the first, except for disks, GPUs, interfaces and
    /// passed-through devices.
    pub fn option(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        let value = value.as_ref().to_string_lossy().into_owned();
        let old = self.arguments.iter().position(|argument| argument == name);
        match old {
            Some(at) if !matches!(name, "--disk" | "--net" | "--vfio" | "--gpu") => {
                self.arguments[at + 1] = value
            }
            _ => self.arguments.extend([name.to_owned(), value]),
        }
        self
    }

    /// A path in the guest's directory, which is deleted with the guest.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Puts a file into the guest's root.
    pub fn file(mut self, name: &str, content: &[u8]) -> Self {
        self.archive.file(name, content);
        self
    }

    /// Adds a program of the graphics tools to the guest's root.
    pub fn graphics_tool(mut self, path: &str) -> Result<Self> {
        let tools = &self.assets.graphics_tools;
        self.archive.debian_program(tools, path)?;
        Ok(self)
    }

    /// Loads more modules of Debian's kernel in the guest, with their dependencies.
    pub fn modules(mut self, names: &[impl AsRef<str>]) -> Result<Self> {
        let modules = self.assets.drivers.modules()?;
        let names: Vec<_> = names.iter().map(AsRef::as_ref).collect();
        self.archive.modules(&modules, &names)?;
        Ok(self)
    }

    /// The guest's root.
    pub fn initrd(&self) -> Result<Vec<u8>> {
        let mut initrd =
            fs::read(&self.assets.guest_archive).context("cannot read the guest's root")?;
        let mut more = self.archive.clone();
        more.file("test", format!("#!/bin/sh\n{}\n", self.script).as_bytes());
        initrd.extend(more.finish());
        Ok(initrd)
    }

    /// Writes the guest's root, and returns its path.
    fn write_root(&self) -> Result<PathBuf> {
        let path = self.path("initrd");
        fs::write(&path, self.initrd()?).context("cannot write the guest's root")?;
        Ok(path)
    }

    /// The command that starts the guest, and the directory that must exist meanwhile.
    pub fn command(self) -> Result<(Command, TempDir)> {
        let initrd_path = self.write_root()?;
        let kernel = match self.kernel {
            GuestKernel::Stock => &self.assets.stock.image,
            GuestKernel::Vmlinux => &self.assets.built_kernel.vmlinux,
        };
        let mut command = match &self.graphics {
            None => Command::new(&self.assets.fanlight),
            Some(stack) => stack.command(&self.assets.fanlight),
        };
        command
            .arg("run")
            .arg("--kernel")
            .arg(kernel)
            .arg("--initrd")
            .arg(&initrd_path)
            .args(["--cmdline", &self.cmdline])
            .args(&self.arguments);
        Ok((command, self.dir))
    }

    /// Starts the guest.
    pub fn start(self) -> Result<Guest> {
        let (command, dir) = self.command()?;
        Guest::spawn(command, dir)
    }

    /// Starts the guest, and expects it to power itself off. Returns the output of the guest and Fanlight.
    pub fn run(self) -> Result<String> {
        let mut guest = self.start()?;
        guest.expect_exit(0)?;
        Ok(guest.transcript())
    }
}

/// A guest that runs or has ended; killed when dropped.
pub struct Guest {
    child: Child,
    stdin: Option<ChildStdin>,
    heard: Arc<Heard>,
    readers: Vec<JoinHandle<()>>,
    dir: TempDir,
}

#[derive(Default)]
struct Heard {
    text: Mutex<String>,
    changed: Condvar,
}

impl Guest {
    /// Starts any command as a guest.
    pub fn spawn(mut command: Command, dir: TempDir) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context(format!("cannot start {}", command.get_program().display()))?;
        let heard = Arc::new(Heard::default());
        let outputs: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|o| Box::new(o) as Box<_>),
            child.stderr.take().map(|o| Box::new(o) as Box<_>),
        ];
        let outputs = outputs.into_iter().flatten();
        let readers = outputs.map(|mut output| {
            let heard = heard.clone();
            thread::spawn(move || {
                let mut bytes = [0; 4096];
                while let Ok(read @ 1..) = output.read(&mut bytes) {
                    heard.add(&bytes[..read]);
                }
            })
        });
        let readers = readers.collect();
        Ok(Self {
            stdin: child.stdin.take(),
            child,
            heard,
            readers,
            dir,
        })
    }

    /// All output so far.
    pub fn transcript(&self) -> String {
        self.heard.lock().clone()
    }

    /// Runs a conversation with the guest, which ends with the guest. A failure has the guest's output, after a pause
    /// in which the guest can print its reason.
    pub fn converse<T: Send + 'static>(
        &mut self,
        conversation: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let talk = thread::spawn(conversation);
        let mut ended = None;
        while !talk.is_finished() {
            if ended.is_none() && self.child.try_wait().ok().flatten().is_some() {
                ended = Some(Instant::now());
            }
            if ended.is_some_and(|ended| ended.elapsed() > LEAVE) {
                return Err(self.failure("the guest ended in the middle of a conversation"));
            }
            thread::sleep(Duration::from_millis(20));
        }
        let said = talk
            .join()
            .unwrap_or_else(|_| Err(Failure("a conversation panicked".into())));
        said.map_err(|error| {
            thread::sleep(LEAVE);
            if error.0.contains(HANG) || self.transcript().contains(HANG) {
                self.hang(error)
            } else {
                self.failure(error)
            }
        })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A path in the guest's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn failure(&self, what: impl std::fmt::Display) -> Failure {
        Failure(format!("{what}; the guest said:\n{}", self.transcript()))
    }

    /// The failure for a guest that does not continue. It lists the activity of its threads twice, a second apart,
    /// which distinguishes waiting from spinning.
    fn hang(&self, what: impl std::fmt::Display) -> Failure {
        let mut doing = process_activity::of(self.pid());
        thread::sleep(Duration::from_secs(1));
        doing += &process_activity::of(self.pid());
        self.failure(format!("{HANG}: {what}; its threads:\n{doing}"))
    }

    /// Waits until `text` was printed `count` times.
    pub fn wait_for_times(&mut self, text: &str, count: usize) -> Result<()> {
        let mut last = (0, Instant::now());
        loop {
            let ended = self.child.try_wait().ok().flatten();
            let heard = self.heard.lock();
            if heard.matches(text).count() >= count {
                return Ok(());
            }
            if heard.len() != last.0 {
                last = (heard.len(), Instant::now());
            }
            let heard = self
                .heard
                .changed
                .wait_timeout(heard, Duration::from_millis(200))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            let found = heard.matches(text).count() >= count;
            drop(heard);
            if let (false, Some(status)) = (found, ended) {
                return Err(self.failure(format!("ended ({status}) before it printed {text:?}")));
            }
            if last.1.elapsed() > PATIENCE {
                return Err(self.hang(format!("never printed {text:?}")));
            }
        }
    }

    /// Waits until `text` was printed.
    pub fn wait_for(&mut self, text: &str) -> Result<()> {
        self.wait_for_times(text, 1)
    }

    /// Types on the guest's console.
    pub fn send(&mut self, text: &str) -> Result<()> {
        let stdin = self
            .stdin
            .as_mut()
            .ok_or(Failure("the guest has no input".into()))?;
        stdin
            .write_all(text.as_bytes())
            .and_then(|()| stdin.flush())
            .context("cannot type")
    }

    /// Sends the process a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.child), signal).context("cannot send a signal")
    }

    /// Waits for the end. Returns the exit status.
    pub fn exit_status(&mut self) -> Result<i32> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().context("cannot wait")? {
                self.hear_all();
                return status
                    .code()
                    .ok_or_else(|| self.failure(format!("ended by {status}")));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Err(self.hang("never ended"))
    }

    /// Reads the remaining output of a process that has ended.
    fn hear_all(&self) {
        let start = Instant::now();
        // A process that it started may keep a pipe open for longer.
        while start.elapsed() < LEAVE && !self.readers.iter().all(JoinHandle::is_finished) {
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for the end, and checks the exit status.
    pub fn expect_exit(&mut self, expected: i32) -> Result<()> {
        match self.exit_status()? {
            status if status == expected => Ok(()),
            status => Err(self.failure(format!("exit status {status}, not {expected}"))),
        }
    }
}

impl Heard {
    fn lock(&self) -> std::sync::MutexGuard<'_, String> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, bytes: &[u8]) {
        let text = String::from_utf8_lossy(bytes).replace('\r', "");
        self.lock().push_str(&text);
        self.changed.notify_all();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An image file of `size` bytes for a disk, made by qemu-img.
pub fn make_image(assets: &Assets, path: &Path, format: &str, size: &str) -> Result<()> {
    qemu_img(assets, &["create", "-q", "-f", format], path, &[size]).map(drop)
}

/// Runs qemu-img on an image, and returns its output.
pub fn qemu_img(assets: &Assets, verb: &[&str], path: &Path, more: &[&str]) -> Result<String> {
    let output = assets
        .emulator
        .command("qemu-img")
        .args(verb)
        .arg(path)
        .args(more)
        .output()
        .context("cannot run qemu-img")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure(
        output.status.success(),
        format!(
            "qemu-img {verb:?} ({}): {said}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        ),
    )?;
    Ok(said)
}
