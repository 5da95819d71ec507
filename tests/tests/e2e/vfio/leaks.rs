//! Machines with passed-through devices leave nothing behind when they end.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use fanlight_api::client::Client;
use fanlight_tests::{
    Context, Failure, Result,
    common::edu,
    ensure,
    host_side::guest::{Assets, Guest},
};
use serde_json::{Value, json};

use super::{PATIENCE, group_node, open, whole_function};

/// Number of starts and stops.
const ROUNDS: usize = 50;
/// Guest RAM of each machine, in pages.
const RAM_PAGES: u64 = (128 << 20) >> 12;
/// Far longer than the last thread of a machine takes to exit.
const SETTLED: Duration = Duration::from_secs(30);
/// Rounds after which the process has all that it keeps permanently.
const WARM: usize = 4;

/// One process runs fifty machines with the same two devices in turn, through both interfaces. Devices are there at the
/// start or are hot-plugged. No machine leaves a descriptor, a pinned page or a mapping.
pub fn fifty_starts_leave_nothing(assets: &Assets) -> Result<()> {
    let edu = whole_function(assets, edu::IDS)?;
    let memory = whole_function(assets, edu::MEMORY_IDS)?;
    let dir = tempfile::tempdir().context("a directory")?;
    let socket = dir.path().join("api");
    let initrd = dir.path().join("initrd");
    fs::write(&initrd, assets.initrd("sleep 1000")?).context("cannot write the guest's root")?;
    let mut command = Command::new(&assets.fanlight);
    command.arg("serve").arg("--api-socket").arg(&socket);
    let server = Guest::spawn(command, dir)?;
    let mut client = connect(&socket)?;
    let mut call = |method: &str, params: Value, fds: &[BorrowedFd<'_>]| {
        let result = client.call_json(method, &params, fds);
        result.map(drop).context(method)
    };
    let idle = Held::of(server.pid())?;
    let mut warm: Option<Held> = None;
    for round in 1..=ROUNDS {
        let by_path = |iommufd: &str| {
            [&edu, &memory].map(|address| json!({"device": address, "iommufd": iommufd}))
        };
        let at_start = match round % 4 {
            0 => by_path("on").to_vec(),
            1 => by_path("off").to_vec(),
            _ => Vec::new(),
        };
        let machine = json!({
            "kernel": assets.built_kernel.vmlinux, "initrd": initrd, "memory": {"size": "128M"},
            "serial": "null", "cmdline": "console=ttyS0", "vfio": at_start,
        });
        call("vm.create", machine, &[])?;
        call("vm.boot", json!({}), &[])?;
        match round % 4 {
            2 => {
                for device in by_path("on") {
                    call("device.add", json!({"vfio": device}), &[])?;
                }
            }
            // As a launcher passes descriptors.
            3 => {
                let [first, second] = [group_node(&edu)?, group_node(&memory)?];
                let container = open("/dev/vfio/vfio")?;
                let mut device = json!({"device": edu, "group": {"fd": 0}, "iommu": {"fd": 1}});
                let other = [first.as_fd(), first.as_fd()];
                let refused = call("device.add", json!({"vfio": device}), &other).err();
                let why = refused.map_or_else(String::new, |error| error.to_string());
                ensure(why.contains("not a VFIO container"), &why)?;
                let fds = [first.as_fd(), container.as_fd()];
                call("device.add", json!({"vfio": device}), &fds)?;
                device = json!({"device": memory, "group": {"fd": 0}});
                call("device.add", json!({"vfio": device}), &[second.as_fd()])?;
            }
            _ => {}
        }
        let running = Held::of(server.pid())?;
        // The kernel's counters lag by some pages.
        let [before, now] = [&idle, &running].map(|held| held.pinned);
        ensure(
            now > before + RAM_PAGES / 2,
            format!("round {round}: {now} pinned after {before}"),
        )?;
        ensure(
            running.huge > idle.huge + RAM_PAGES / 4 * 3,
            format!(
                "round {round}: {} pages are in huge ones after {}",
                running.huge, idle.huge
            ),
        )?;
        let open = running.files.keys().filter(|name| name.contains("vfio"));
        ensure(open.count() > 0, format!("round {round}: {running:?}"))?;
        call("vm.stop", json!({}), &[])?;
        match &warm {
            Some(warm) => warm.comes_back(server.pid(), round)?,
            None => {
                idle.pins_come_back(server.pid(), round)?;
                warm = (round == WARM)
                    .then(|| Held::of(server.pid()))
                    .transpose()?;
            }
        }
    }
    Ok(())
}

fn connect(socket: &Path) -> Result<Client> {
    let start = Instant::now();
    let client = loop {
        match Client::connect(socket) {
            Ok(client) => break client,
            Err(error) if start.elapsed() > PATIENCE => return Err(Failure(error.to_string())),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    };
    let patience = client.socket().set_read_timeout(Some(PATIENCE));
    patience.context("cannot set a timeout")?;
    Ok(client)
}

/// Resources that a process holds.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    /// Count of descriptors by the file they refer to.
    files: BTreeMap<String, usize>,
    /// File mappings.
    mappings: BTreeMap<String, usize>,
    /// Pages pinned for DMA, of the whole system.
    pinned: u64,
    /// Memory that counts against the process's lock limit, in KiB.
    locked: u64,
    /// Pages of memory files that are in huge pages, of the whole system. Guest RAM keeps its page size once it is
    /// pinned.
    huge: u64,
}

impl Held {
    fn of(pid: u32) -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).context(format!("cannot read {path}"));
        let mut files = BTreeMap::new();
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).context("cannot list fds")?;
        // A descriptor that was closed meanwhile does not count.
        for link in descriptors.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok()) {
            let name = link.to_string_lossy();
            // Names of sockets and pipes end in numbers.
            let name = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == ']');
            *files.entry(name.to_owned()).or_default() += 1;
        }
        let mut mappings = BTreeMap::new();
        for line in read(&format!("/proc/{pid}/maps"))?.lines() {
            let name = line.split_whitespace().nth(5).unwrap_or_default();
            if !name.is_empty() && !name.starts_with('[') {
                *mappings.entry(name.to_owned()).or_default() += 1;
            }
        }
        let number = |text: &str, name: &str| -> u64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let word = line.and_then(|line| line.split_whitespace().next());
            word.and_then(|word| word.parse().ok()).unwrap_or(0)
        };
        let (status, vmstat) = (read(&format!("/proc/{pid}/status"))?, read("/proc/vmstat")?);
        let meminfo = read("/proc/meminfo")?;
        let acquired = number(&vmstat, "nr_foll_pin_acquired");
        Ok(Self {
            files,
            mappings,
            pinned: acquired.saturating_sub(number(&vmstat, "nr_foll_pin_released")),
            locked: number(&status, "VmPin:") + number(&status, "VmLck:"),
            huge: number(&meminfo, "ShmemHugePages:") / 4,
        })
    }

    /// Waits until the process holds the same again: threads exit, and the kernel closes files, with a short delay.
    fn comes_back(&self, pid: u32, round: usize) -> Result<()> {
        let is_open = |held: &Self| (held.files.clone(), held.mappings.clone());
        self.wait(pid, round, |now| {
            is_open(now) == is_open(self) && self.pins_are_back(now)
        })
    }

    /// Waits until the pinned and locked pages are back to the earlier counts.
    fn pins_come_back(&self, pid: u32, round: usize) -> Result<()> {
        self.wait(pid, round, |now| self.pins_are_back(now))
    }

    fn pins_are_back(&self, now: &Self) -> bool {
        now.pinned <= self.pinned && now.locked <= self.locked
    }

    fn wait(&self, pid: u32, round: usize, is_enough: impl Fn(&Self) -> bool) -> Result<()> {
        let start = Instant::now();
        loop {
            let now = Self::of(pid)?;
            if is_enough(&now) {
                return Ok(());
            }
            let late = start.elapsed() > SETTLED;
            ensure(!late, format!("after {round} rounds {now:?}, not {self:?}"))?;
            thread::sleep(Duration::from_millis(20));
        }
    }
}
