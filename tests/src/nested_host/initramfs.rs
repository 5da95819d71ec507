//! Initial RAM disks: cpio archives (newc) of programs, busybox and kernel modules. The kernel unpacks all archives that
//! lie one behind the other.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::{Busybox, DebianPrograms, Modules, command::run};
use crate::{Context, Result};

/// The first program of the guest. Benchmarks wait for its first line.
const GUEST_INIT: &str = include_str!("../../../resources/guest/init");
/// The first program of L1.
const L1_INIT: &str = include_str!("../../../resources/nested_host/init");

/// Modules that a guest needs to use every device of the machine.
const GUEST_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "pvpanic_mmio",
    "pvpanic_pci",
    "evdev",
    "button",
];

/// A cpio archive under construction.
#[derive(Clone, Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    /// Libraries of Debian programs that the archive has.
    placed: BTreeSet<String>,
}

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CONSOLE: u32 = 0o020_600;

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            content.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Adds a program or another file, and the directories above it.
    pub fn file(&mut self, path: &str, content: &[u8]) {
        let path = path.trim_start_matches('/');
        for (end, _) in path.match_indices('/') {
            self.entry(&path[..end], DIRECTORY, (0, 0), &[]);
        }
        self.entry(path, PROGRAM, (0, 0), content);
    }

    /// Adds a file of the host.
    pub fn host_file(&mut self, path: &str, from: &Path) -> Result<()> {
        let content = fs::read(from).context(format!("cannot read {}", from.display()))?;
        self.file(path, &content);
        Ok(())
    }

    /// Adds the libraries that a program of the host needs, at their own paths.
    pub fn libraries_of(&mut self, program: &Path) -> Result<()> {
        for library in libraries(program)? {
            self.host_file(&library.to_string_lossy(), &library)?;
        }
        Ok(())
    }

    /// Adds a Debian program as a command of its own name. Its libraries lie apart from those of the host.
    pub fn debian_program(&mut self, programs: &DebianPrograms, path: &str) -> Result<()> {
        const PLACE: &str = "debian";
        let (name, loader) = (path.rsplit('/').next().unwrap_or(path), programs.loader());
        self.host_file(&format!("{PLACE}/{name}"), &programs.0.join(path))?;
        for library in programs.libraries(path)?.iter().chain([&loader]) {
            let file = library.file_name().unwrap_or_default().to_string_lossy();
            if self.placed.insert(file.to_string()) {
                self.host_file(&format!("{PLACE}/lib/{file}"), library)?;
            }
        }
        let file = loader.file_name().unwrap_or_default().to_string_lossy();
        let script = format!(
            "#!/bin/sh\nexec /{PLACE}/lib/{file} --library-path /{PLACE}/lib /{PLACE}/{name} \"$@\"\n"
        );
        self.file(&format!("bin/{name}"), script.as_bytes());
        Ok(())
    }

    /// Adds modules as `/modules/NN-name.ko`, to be loaded in that order.
    pub fn modules(&mut self, modules: &Modules, names: &[&str]) -> Result<()> {
        for (index, (name, content)) in modules.load_order(names)?.iter().enumerate() {
            self.file(&format!("modules/{index:02}-{name}.ko"), content);
        }
        Ok(())
    }

    /// The archive's bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    /// busybox, mount points, a console, and `init` as the first program.
    fn system(busybox: &Busybox, init: &str) -> Result<Self> {
        let mut archive = Self::default();
        for dir in ["bin", "dev", "etc", "mnt", "proc", "run", "sys", "tmp"] {
            archive.entry(dir, DIRECTORY, (0, 0), &[]);
        }
        archive.entry("dev/console", CONSOLE, (5, 1), &[]);
        archive.host_file("bin/busybox", &busybox.0)?;
        archive.file("init", init.as_bytes());
        Ok(archive)
    }

    /// The root of L1, which runs `/job`.
    pub fn l1(busybox: &Busybox) -> Result<Self> {
        Self::system(busybox, L1_INIT)
    }
}

/// The root of a guest with every driver and, if one is given, the agent. It runs `/test`, which tests add in an
/// archive behind this one.
pub fn guest_archive(
    busybox: &Busybox,
    modules: Option<&Modules>,
    agent: Option<&Path>,
) -> Result<Vec<u8>> {
    let mut archive = Archive::system(busybox, GUEST_INIT)?;
    if let Some(modules) = modules {
        archive.modules(modules, GUEST_MODULES)?;
    }
    if let Some(agent) = agent {
        archive.host_file("bin/guest-agent", agent)?;
        archive.libraries_of(agent)?;
    }
    Ok(archive.finish())
}

/// The shared libraries and the loader of a program of the host.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let list = run(Command::new("ldd").arg(program))?;
    Ok(list
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .filter(|path| path != program)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archives_are_aligned_and_end() {
        let mut archive = Archive::default();
        archive.file("/a/b", b"hello");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], b"070701");
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("a/b\0") && text.contains("TRAILER!!!"));
    }
}
