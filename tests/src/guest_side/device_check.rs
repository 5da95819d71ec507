//! Checks in a guest whether a passed-through device works with its driver, before and after a reset. Only actions
//! without an outside effect are tried, as the device's class allows.
//!
//! Prints a line that starts with `did:` for a check that succeeded, and with `not:` for one that cannot be tried.

use std::{
    fs::{self, File},
    io::Read,
    net::UdpSocket,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use crate::{Context, Failure, Result, common::pci::Function, ensure};

/// Far longer than a driver takes to start; speed does not matter.
const PATIENCE: Duration = Duration::from_secs(60);
/// A link or disk that does not appear in this time does not exist.
const MEDIUM: Duration = Duration::from_secs(60);
/// Base classes (PCI Code and ID Assignment 1.11, 1).
const STORAGE: u32 = 0x01;
const NETWORK: u32 = 0x02;
const DISPLAY: u32 = 0x03;

/// What a driver did with its device.
struct Work {
    what: String,
    /// Whether this raises interrupts.
    interrupts: bool,
}

/// Checks the only function with this description ([`Function::describe`]). It must hide host properties, and work with
/// its driver, if one is expected. If it can be reset, it must work again afterwards.
pub fn check_device(description: &str, has_driver: bool, with_reset: bool) -> Result<String> {
    let function = Function::described(description)?;
    function.hides_what_is_the_hosts()?;
    println!("did: is {description}");
    if has_driver {
        use_driver(&function)?;
    } else {
        println!("not: a driver, of which the stock guest has none for it");
    }
    if with_reset {
        reset(&function)?;
    }
    Ok("tried the device".into())
}

fn use_driver(function: &Function) -> Result<()> {
    let driver = wait(PATIENCE, || function.driver());
    let driver = driver.ok_or_else(|| {
        let log = run("/bin/dmesg", &[]).unwrap_or_default();
        let address = function.address();
        let lines = log.lines().filter(|line| line.contains(&address));
        let lines: Vec<_> = lines.collect();
        Failure(format!(
            "no driver has taken it; the guest's kernel says {lines:#?}"
        ))
    })?;
    println!("did: driver {driver}");
    let work = match function.class()? >> 16 {
        STORAGE => read_disks(function)?,
        NETWORK => send(function)?,
        DISPLAY => find_card(function)?,
        _ => None,
    };
    match &work {
        Some(work) => println!("did: {}", work.what),
        None => println!("not: work for its driver"),
    }
    let must = work.is_some_and(|work| work.interrupts);
    let (kind, vectors) = vectors(function)?;
    let count = wait(PATIENCE, || {
        let count = count(&vectors);
        (count > 0 || !must || vectors.is_empty()).then_some(count)
    });
    let used = vectors.len();
    let count = count.ok_or_else(|| Failure(format!("none of {used} vectors ({kind}) came")))?;
    match (used, count) {
        (0, _) => println!("not: interrupts, which it has none of"),
        (_, 0) => println!("not: interrupts, of which none came by {kind} with {used} vectors"),
        _ => println!("did: {kind} with {used} vectors: {count} interrupts"),
    }
    Ok(())
}

/// Resets the function by the first method that the guest's kernel offers. BARs must stay in place, and the driver must
/// work again.
fn reset(function: &Function) -> Result<()> {
    let methods = function.attribute("reset_method").unwrap_or_default();
    let Some(method) = methods.split_whitespace().next() else {
        println!("not: a reset in the guest, which has no way for that");
        return Ok(());
    };
    let driver = function.driver();
    if driver.is_some() {
        function.unbind()?;
    }
    let place = || Ok::<_, Failure>((function.describe()?, function.attribute("resource")?));
    let before = place()?;
    fs::write(function.path().join("reset"), "1").context(format!("cannot reset by {method}"))?;
    let after = place()?;
    ensure(
        before == after,
        format!("the reset by {method} made {before:?} to {after:?}"),
    )?;
    println!("did: reset by {method}");
    if let Some(driver) = driver {
        function.bind(&driver)?;
        use_driver(function)?;
    }
    Ok(())
}

/// Sends broadcasts, if the link has a carrier. The device reads each one from guest memory, and writes its completion
/// there.
fn send(function: &Function) -> Result<Option<Work>> {
    const COUNT: u64 = 32;
    let interface = wait(PATIENCE, || below(function, "/sys/class/net").pop());
    let interface = interface.ok_or_else(|| Failure("its driver has made no interface".into()))?;
    let name = name(&interface);
    let ip = |arguments: &str| {
        let arguments: Vec<_> = arguments.split_whitespace().collect();
        run("/bin/ip", &arguments)
    };
    ip(&format!("link set {name} up"))?;
    // The interface of a driver that was bound again is new and has no address.
    ip(&format!("addr add 169.254.9.9/16 brd + dev {name}"))?;
    let number = |file: &str| -> Option<u64> {
        let text = fs::read_to_string(interface.join(file)).ok()?;
        text.trim().parse().ok()
    };
    let carrier = wait(MEDIUM, || (number("carrier")? == 1).then_some(()));
    if carrier.is_none() {
        println!("not: packets, for there is no carrier");
        return Ok(None);
    }
    let sent = || number("statistics/tx_packets").unwrap_or(0);
    let before = sent();
    let socket = UdpSocket::bind("169.254.9.9:0").context("cannot make a socket")?;
    socket
        .set_broadcast(true)
        .context("cannot make a socket broadcast")?;
    for _ in 0..COUNT {
        // The discard port.
        let sent = socket.send_to(&[0; 64], "169.254.255.255:9");
        sent.context("cannot send")?;
    }
    let done = wait(PATIENCE, || (sent() >= before + COUNT).then_some(()));
    done.ok_or_else(|| Failure(format!("{} of {COUNT} packets left", sent() - before)))?;
    Ok(Some(Work {
        what: format!("sent {COUNT} packets"),
        interrupts: true,
    }))
}

/// Reads the start of the function's disks, if it has any.
fn read_disks(function: &Function) -> Result<Option<Work>> {
    const LEN: u64 = 1 << 20;
    let find = || Some(below(function, "/sys/block")).filter(|disks| !disks.is_empty());
    let Some(disks) = wait(MEDIUM, find) else {
        println!("not: reading, for there is no disk");
        return Ok(None);
    };
    let mut read = Vec::new();
    for disk in disks {
        let name = name(&disk);
        let mut bytes = Vec::new();
        let file = File::open(Path::new("/dev").join(&name));
        let got = file.and_then(|file| file.take(LEN).read_to_end(&mut bytes));
        let got = got.context(format!("cannot read {name}"))?;
        read.push(format!("{got} bytes of {name}"));
    }
    Ok(Some(Work {
        what: format!("read {}", read.join(", ")),
        interrupts: true,
    }))
}

/// Opens the DRM card that the driver created.
fn find_card(function: &Function) -> Result<Option<Work>> {
    let find = || {
        let nodes = below(function, "/sys/class/drm");
        let is_node = |node: &String| node.starts_with("card") && !node.contains('-');
        nodes.iter().map(|node| name(node)).find(is_node)
    };
    let card = wait(PATIENCE, find);
    let card = card.ok_or_else(|| Failure("its driver has made no card".into()))?;
    File::open(format!("/dev/dri/{card}")).context(format!("cannot open {card}"))?;
    Ok(Some(Work {
        what: format!("opened {card}"),
        interrupts: true,
    }))
}

/// Entries of a directory of links that lie below the function's directory.
fn below(function: &Function, directory: &str) -> Vec<PathBuf> {
    let Ok(place) = fs::canonicalize(function.path()) else {
        return Vec::new();
    };
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths
        .filter(|path| fs::canonicalize(path).is_ok_and(|target| target.starts_with(&place)))
        .collect()
}

fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// The interrupt kind of the function, and the numbers of the interrupts that its driver requested.
fn vectors(function: &Function) -> Result<(String, Vec<String>)> {
    let messages = fs::read_dir(function.path().join("msi_irqs"));
    let messages: Vec<_> = messages.into_iter().flatten().flatten().collect();
    let (kind, mut numbers) = match messages.first() {
        Some(first) => {
            let kind = fs::read_to_string(first.path()).context("cannot tell MSI from MSI-X")?;
            let kind = match kind.trim() {
                "msix" => "MSI-X",
                _ => "MSI",
            };
            let numbers = messages.iter().map(|entry| name(&entry.path()));
            (kind, numbers.collect())
        }
        None => ("INTx", vec![function.attribute("irq")?]),
    };
    let text = interrupts();
    let asked = || text.lines().filter_map(|line| line.split_once(':'));
    // Number 0 means no interrupt; it is the timer's.
    numbers.retain(|number| number != "0" && asked().any(|(other, _)| other.trim() == number));
    Ok((kind.into(), numbers))
}

fn interrupts() -> String {
    fs::read_to_string("/proc/interrupts").unwrap_or_default()
}

/// How often these interrupts were raised.
fn count(vectors: &[String]) -> u64 {
    let text = interrupts();
    let of_line = |line: &str| {
        let (number, rest) = line.split_once(':')?;
        let is_one = vectors.iter().any(|vector| vector == number.trim());
        let counts = rest.split_whitespace();
        let counts = counts.map_while(|word| word.parse::<u64>().ok());
        is_one.then(|| counts.sum::<u64>())
    };
    text.lines().filter_map(of_line).sum()
}

fn wait<T>(patience: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        let found = look();
        if found.is_some() || start.elapsed() > patience {
            return found;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.context(format!("cannot run {program}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure(
        output.status.success(),
        format!("{program} {arguments:?}: {errors}"),
    )?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
