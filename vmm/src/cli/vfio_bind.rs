//! `fanlight vfio`: lists PCI devices of the host, binds them to vfio-pci and unbinds them, through sysfs.
//!
//! There is no state file. `unbind` reads the device's present state, so it also undoes a manual bind.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use fanlight_devices::vfio::sysfs::{HostFunction, PciAddress, PciAddressError, VFIO_PCI};
use thiserror::Error;

/// PCI drivers that the kernel has loaded.
const DRIVERS: &str = "/sys/bus/pci/drivers";
/// Makes the kernel choose a driver for a device.
const PROBE: &str = "/sys/bus/pci/drivers_probe";

/// Why a device was not bound or unbound.
#[derive(Debug, Error)]
pub enum VfioBindError {
    /// Not a PCI address.
    #[error(transparent)]
    Address(#[from] PciAddressError),
    /// The host has no such device.
    #[error("{0}: the host has no such PCI device; see 'fanlight vfio list'")]
    NoDevice(PciAddress),
    /// The host uses it.
    #[error("{address}: in use: {users}; stop that first")]
    InUse {
        /// The device.
        address: PciAddress,
        /// What uses it.
        users: String,
    },
    /// A PCI bridge.
    #[error("{0}: a PCI bridge cannot be passed through; choose another device")]
    Bridge(PciAddress),
    /// It does not support SR-IOV.
    #[error("{0}: has no virtual functions; omit --vfs to bind the device itself")]
    NoVirtualFunctions(PciAddress),
    /// Too many virtual functions.
    #[error(
        "{address}: has at most {total} virtual functions; give --vfs a number from 1 to {total}"
    )]
    TooManyVirtualFunctions {
        /// The device.
        address: PciAddress,
        /// The most it can have.
        total: u32,
    },
    /// It has another number of virtual functions.
    #[error(
        "{address}: has {now} virtual functions already; give --vfs {now}, or remove them with \
         'fanlight vfio unbind {address}'"
    )]
    OtherVirtualFunctions {
        /// The device.
        address: PciAddress,
        /// How many there are.
        now: u32,
    },
    /// Nothing to undo.
    #[error("{0}: not bound to {VFIO_PCI} and without virtual functions; there is nothing to undo")]
    NothingToUndo(PciAddress),
    /// The driver is not loaded.
    #[error(
        "no driver {VFIO_PCI}: load it with `modprobe {VFIO_PCI}`, or install a kernel that has it"
    )]
    NoDriver,
    /// No permission.
    #[error("no permission on {}: run this as root", .0.display())]
    Permission(PathBuf),
    /// The kernel refused.
    #[error("{address}: cannot {action}")]
    Host {
        /// The device.
        address: PciAddress,
        /// What was tried.
        action: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// The device at an address that a user gave.
pub fn find(text: &str) -> Result<HostFunction, VfioBindError> {
    let address: PciAddress = text.parse()?;
    HostFunction::find(address).ok_or(VfioBindError::NoDevice(address))
}

/// A table of the functions that can be passed through.
pub fn list() -> io::Result<String> {
    let mut rows = vec![["ADDRESS", "ID", "CLASS", "DRIVER", "GROUP", "NOTES"].map(String::from)];
    for function in HostFunction::all()? {
        if !is_bridge(&function) {
            rows.push(row(&function));
        }
    }
    let mut text = String::new();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<_> = (0..6).map(width).collect();
    for row in &rows {
        let cells: Vec<_> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    Ok(text)
}

fn row(function: &HostFunction) -> [String; 6] {
    let hex = |name| function.hex(name).unwrap_or(0);
    let mut notes = Vec::new();
    if let Some(physical) = function.physical_function() {
        notes.push(format!("virtual function of {physical}"));
    }
    if let Some((now, total)) = function.virtual_functions() {
        notes.push(format!("{now} of {total} virtual functions"));
    }
    let users = users(function);
    if !users.is_empty() {
        notes.push(format!("in use: {}", users.join(", ")));
    } else if function.driver().as_deref() == Some(VFIO_PCI) {
        notes.push("ready for --vfio".into());
    }
    [
        function.address.to_string(),
        format!("{:04x}:{:04x}", hex("vendor"), hex("device")),
        class_name(hex("class")).into(),
        function.driver().unwrap_or_else(|| "-".into()),
        function
            .group()
            .map_or("-".into(), |group| group.to_string()),
        notes.join("; "),
    ]
}

/// A function in a few words: class, ID and driver.
pub fn summary(function: &HostFunction) -> String {
    let hex = |name| function.hex(name).unwrap_or(0);
    format!(
        "{} {:04x}:{:04x}, {}",
        class_name(hex("class")),
        hex("vendor"),
        hex("device"),
        function
            .driver()
            .map_or("no driver".into(), |driver| format!("driver {driver}"))
    )
}

/// Names of base classes (PCI Code and ID Assignment 1.11, section 1).
fn class_name(class: u32) -> &'static str {
    match class >> 16 {
        0x01 => "storage",
        0x02 => "network",
        0x03 => "display",
        0x04 => "multimedia",
        0x05 => "memory",
        0x06 => "bridge",
        0x07 => "communication",
        0x08 => "system",
        0x09 => "input",
        0x0c => "serial bus",
        0x0d => "wireless",
        0x10 => "encryption",
        0x12 => "accelerator",
        _ => "other",
    }
}

/// Whether the function is a PCI bridge.
pub fn is_bridge(function: &HostFunction) -> bool {
    function
        .hex("class")
        .is_some_and(|class| class >> 16 == 0x06)
}

/// Binds `function` to vfio-pci, or creates `vfs` virtual functions of it and binds those. Returns the
/// bound functions.
pub fn bind(function: &HostFunction, vfs: Option<u32>) -> Result<Vec<PciAddress>, VfioBindError> {
    let address = function.address;
    if is_bridge(function) {
        return Err(VfioBindError::Bridge(address));
    }
    load_driver()?;
    let Some(wanted) = vfs else {
        bind_one(function)?;
        return Ok(vec![address]);
    };
    let (now, total) = function
        .virtual_functions()
        .ok_or(VfioBindError::NoVirtualFunctions(address))?;
    if wanted == 0 || wanted > total {
        return Err(VfioBindError::TooManyVirtualFunctions { address, total });
    }
    if now != 0 && now != wanted {
        return Err(VfioBindError::OtherVirtualFunctions { address, now });
    }
    if now == 0 {
        create_virtual_functions(function, wanted)?;
    }
    let children = function.children();
    for child in &children {
        let child = HostFunction::find(*child).ok_or(VfioBindError::NoDevice(*child))?;
        bind_one(&child)?;
    }
    Ok(children)
}

/// Creates virtual functions that no driver of the host probes first.
fn create_virtual_functions(function: &HostFunction, count: u32) -> Result<(), VfioBindError> {
    const AUTOPROBE: &str = "sriov_drivers_autoprobe";
    let before = function.attribute(AUTOPROBE).ok();
    if before.is_some() {
        write(function, AUTOPROBE, "0")?;
    }
    let made = write(function, "sriov_numvfs", &count.to_string());
    if let Some(before) = before {
        write(function, AUTOPROBE, &before)?;
    }
    made
}

fn bind_one(function: &HostFunction) -> Result<(), VfioBindError> {
    let address = function.address;
    if function.driver().as_deref() == Some(VFIO_PCI) {
        return Ok(());
    }
    refuse_if_used(function)?;
    write(function, "driver_override", VFIO_PCI)?;
    let bound = release(function).and_then(|()| probe(function));
    if bound.is_ok() && function.driver().as_deref() == Some(VFIO_PCI) {
        return Ok(());
    }
    // Return the device to its former driver.
    let _ = write(function, "driver_override", "\n");
    let _ = probe(function);
    bound?;
    Err(VfioBindError::Host {
        address,
        action: format!("bind it to {VFIO_PCI}"),
        source: io::Error::other("the driver refused it; see dmesg"),
    })
}

/// Returns a device to its host driver, or removes all its virtual functions. Returns the functions
/// concerned.
pub fn unbind(function: &HostFunction) -> Result<Vec<PciAddress>, VfioBindError> {
    let children = function.children();
    if !children.is_empty() {
        for child in &children {
            refuse_if_used(&HostFunction::find(*child).ok_or(VfioBindError::NoDevice(*child))?)?;
        }
        write(function, "sriov_numvfs", "0")?;
        return Ok(children);
    }
    if function.driver().as_deref() != Some(VFIO_PCI) {
        return Err(VfioBindError::NothingToUndo(function.address));
    }
    refuse_if_used(function)?;
    write(function, "driver_override", "\n")?;
    release(function)?;
    probe(function)?;
    Ok(vec![function.address])
}

/// Unbinds the device from its driver, if it has one.
fn release(function: &HostFunction) -> Result<(), VfioBindError> {
    match function.driver() {
        Some(_) => write(function, "driver/unbind", &function.address.to_string()),
        None => Ok(()),
    }
}

fn probe(function: &HostFunction) -> Result<(), VfioBindError> {
    let text = function.address.to_string();
    write_file(function.address, Path::new(PROBE), &text)
}

fn write(function: &HostFunction, name: &str, value: &str) -> Result<(), VfioBindError> {
    write_file(function.address, &function.path.join(name), value)
}

fn write_file(address: PciAddress, path: &Path, value: &str) -> Result<(), VfioBindError> {
    fs::write(path, value).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => VfioBindError::Permission(path.into()),
        _ => VfioBindError::Host {
            address,
            action: format!("write {:?} to {}", value.trim(), path.display()),
            source,
        },
    })
}

fn load_driver() -> Result<(), VfioBindError> {
    let driver = Path::new(DRIVERS).join(VFIO_PCI);
    if !driver.exists() {
        // A host without modprobe has the driver built in, or not at all.
        let _ = Command::new("modprobe").arg(VFIO_PCI).status();
    }
    if driver.exists() {
        Ok(())
    } else {
        Err(VfioBindError::NoDriver)
    }
}

fn refuse_if_used(function: &HostFunction) -> Result<(), VfioBindError> {
    let users = users(function);
    if users.is_empty() {
        return Ok(());
    }
    Err(VfioBindError::InUse {
        address: function.address,
        users: users.join(", "),
    })
}

/// Uses of a device by the host, as text.
pub fn users(function: &HostFunction) -> Vec<String> {
    /// The interface is up (Linux `include/uapi/linux/if.h`).
    const IFF_UP: u32 = 1;
    let mut users = Vec::new();
    for (name, path) in members(function, "/sys/class/net") {
        let flags = fs::read_to_string(path.join("flags")).unwrap_or_default();
        let flags = u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16).unwrap_or(0);
        if flags & IFF_UP != 0 {
            users.push(format!("network interface {name} is up"));
        }
    }
    let mounted = mounted_devices();
    for (name, path) in members(function, "/sys/block") {
        if is_mounted(&path, &mounted) {
            users.push(format!("disk {name} is mounted"));
        }
    }
    if let Some((now @ 1.., _)) = function.virtual_functions() {
        users.push(format!("it has {now} virtual functions"));
    }
    let mut nodes: Vec<_> = members(function, "/sys/class/drm")
        .into_iter()
        .map(|(name, _)| Path::new("/dev/dri").join(name))
        .collect();
    nodes.extend(function.character_device());
    if function.driver().as_deref() == Some(VFIO_PCI)
        && let Some(group) = function.group()
    {
        nodes.push(Path::new("/dev/vfio").join(group.to_string()));
    }
    for (process, node) in openers(&nodes) {
        users.push(format!("process {process} has {} open", node.display()));
    }
    users
}

/// Members of a class (such as `/sys/class/net`) that belong to a device: names and directories.
fn members(function: &HostFunction, class: &str) -> Vec<(String, PathBuf)> {
    members_below(&function.path, Path::new(class))
}

fn members_below(device: &Path, class: &Path) -> Vec<(String, PathBuf)> {
    let Ok(device) = fs::canonicalize(device) else {
        return Vec::new();
    };
    let entries = fs::read_dir(class).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let path = fs::canonicalize(entry.path()).ok()?;
            let name = entry.file_name().into_string().ok()?;
            path.starts_with(&device).then_some((name, path))
        })
        .collect()
}

/// Device numbers `major:minor` of mounted file systems.
fn mounted_devices() -> BTreeSet<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2))
        .map(str::to_owned)
        .collect()
}

/// Whether a disk or one of its partitions is mounted, or in use by another block device.
fn is_mounted(disk: &Path, mounted: &BTreeSet<String>) -> bool {
    let number = |path: &Path| fs::read_to_string(path.join("dev")).unwrap_or_default();
    let held = |path: &Path| {
        let mut holders = fs::read_dir(path.join("holders")).into_iter().flatten();
        holders.next().is_some()
    };
    let used = |path: &Path| mounted.contains(number(path).trim()) || held(path);
    let mut parts = fs::read_dir(disk).into_iter().flatten().flatten();
    used(disk) || parts.any(|part| part.path().join("partition").exists() && used(&part.path()))
}

/// Processes that have one of `nodes` open: name with number, and the node. Only root sees all processes.
fn openers(nodes: &[PathBuf]) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    if nodes.is_empty() {
        return found;
    }
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let id = process.file_name().to_string_lossy().into_owned();
        if !id.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let files = fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten();
        let open: BTreeSet<_> = files
            .flatten()
            .filter_map(|file| fs::read_link(file.path()).ok())
            .collect();
        for node in nodes.iter().filter(|node| open.contains(*node)) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push((format!("{} ({id})", name.trim()), node.clone()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_devices_are_named() {
        assert!(matches!(find("gpu"), Err(VfioBindError::Address(_))));
        let error = find("ffff:ff:1f.7").err().unwrap().to_string();
        assert!(
            error.contains("ffff:ff:1f.7") && error.contains("vfio list"),
            "{error}"
        );
    }

    #[test]
    fn open_files_of_this_process_are_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_path_buf();
        let users = openers(std::slice::from_ref(&path));
        let this = format!("({})", std::process::id());
        assert!(
            users.iter().any(|(process, _)| process.ends_with(&this)),
            "{users:?}"
        );
        drop(file);
        assert!(openers(&[path]).is_empty());
    }

    #[test]
    fn members_of_a_class_are_those_below_the_device() {
        let dir = tempfile::tempdir().unwrap();
        let (class, devices) = (dir.path().join("class"), dir.path().join("devices"));
        for (name, device) in [("nvme0n1", "00:01.0/nvme/nvme0"), ("sda", "00:01.1/host0")] {
            let path = devices.join(device).join(name);
            fs::create_dir_all(&path).unwrap();
            fs::create_dir_all(&class).unwrap();
            std::os::unix::fs::symlink(&path, class.join(name)).unwrap();
        }
        let found = members_below(&devices.join("00:01.0"), &class);
        let names: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["nvme0n1"]);
    }
}
