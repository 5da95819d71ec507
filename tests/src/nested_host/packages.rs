//! What the nested host and its tests run from Debian packages, each in a directory of its own in the cache.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use super::{Cache, apt::Apt, command::run};
use crate::{Context, Failure, Result, progress::Step};

/// The emulator, its tools, and `ip`. The suffix holds all of QEMU to one suite.
pub(super) const EMULATOR: &[&str] = &[
    "qemu-system-x86/trixie-backports",
    "qemu-system-common/trixie-backports",
    "qemu-system-data/trixie-backports",
    "seabios/trixie-backports",
    "qemu-utils/trixie-backports",
    "iproute2",
];
/// Kernel series that the nested host is tested with; a newer one is taken when it is gone.
const SERIES: &str = "7.2.";
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
const LOADER: &str = "ld-linux-x86-64.so.2";

/// Runs `work` with an apt of trixie and its backports.
pub(super) fn with_apt(
    cache: &Cache,
    step: &Step,
    work: impl FnOnce(&Apt) -> Result<()>,
) -> Result<()> {
    with_apt_of(&["trixie", "trixie-backports"], cache, step, work)
}

/// Runs `work` with an apt of these suites.
pub(super) fn with_apt_of(
    suites: &[&str],
    cache: &Cache,
    step: &Step,
    work: impl FnOnce(&Apt) -> Result<()>,
) -> Result<()> {
    work(&Apt::new(cache, suites, step)?)
}

/// busybox, linked statically: the shell of guests and of L1.
#[derive(Clone, Debug)]
pub struct Busybox(pub PathBuf);

impl Busybox {
    /// From the cache or the archive.
    pub fn get(cache: &Cache) -> Result<Self> {
        let root = cache.entry("busybox-1", "busybox", |at, step| {
            with_apt(cache, step, |apt| apt.unpack(&["busybox-static"], at))
        })?;
        Ok(Self(root.join("usr/bin/busybox")))
    }
}

/// The kernel of a distribution, with its modules.
#[derive(Clone, Debug)]
pub struct StockKernel {
    /// The bzImage.
    pub image: PathBuf,
    /// `lib/modules/VERSION`.
    pub modules: PathBuf,
}

impl StockKernel {
    /// From the cache or the archive.
    pub fn get(cache: &Cache) -> Result<Self> {
        let root = cache.entry("stock-kernel-1", "the Debian kernel", |at, step| {
            with_apt(cache, step, |apt| {
                let binary = newest(apt.names("linux-binary-")?, SERIES)
                    .ok_or_else(|| Failure("the archive has no linux-binary-*-amd64".into()))?;
                let modules = binary.replace("linux-binary-", "linux-modules-");
                apt.unpack(&[&binary, &modules], at)
            })
        })?;
        let versions = root.join("usr/lib/modules");
        let modules = fs::read_dir(&versions)
            .context("cannot look at the modules of the kernel")?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.join("vmlinuz").exists())
            .ok_or_else(|| Failure(format!("no vmlinuz below {}", versions.display())))?;
        Ok(Self {
            image: modules.join("vmlinuz"),
            modules,
        })
    }
}

/// The newest plain amd64 kernel, of `series` if there is one.
fn newest(names: Vec<String>, series: &str) -> Option<String> {
    let version = |name: &str| -> Vec<u32> {
        name.trim_start_matches("linux-binary-")
            .split(|c: char| !c.is_ascii_digit())
            .map_while(|part| part.parse().ok())
            .collect()
    };
    let plain = |name: &String| {
        name.ends_with("-amd64") && !name.contains("-cloud") && !name.contains("-rt-")
    };
    names.into_iter().filter(plain).max_by_key(|name| {
        (
            name.starts_with(&format!("linux-binary-{series}")),
            version(name),
        )
    })
}

/// The kernel source, as the archive has it.
pub(super) fn kernel_source(cache: &Cache) -> Result<PathBuf> {
    let what = "the source of the L1 kernel";
    let root = cache.entry("kernel-source-1", what, |at, step| {
        with_apt(cache, step, |apt| {
            let wanted = format!("linux-source-{}", SERIES.trim_end_matches('.'));
            let names = apt.names("linux-source-")?;
            let newest = names.iter().max().cloned();
            let name = if names.contains(&wanted) {
                Some(wanted)
            } else {
                newest
            };
            let name = name.ok_or_else(|| Failure("the archive has no linux-source".into()))?;
            apt.unpack(&[&name], at)
        })
    })?;
    fs::read_dir(root.join("usr/src"))
        .context("cannot look for the kernel source")?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "xz"))
        .ok_or_else(|| Failure("the kernel source has no archive".into()))
}

/// Gives unpacked packages what makes a system of them.
pub(super) fn complete_system(at: &Path) -> Result<()> {
    // Programs look for themselves where base-files would have put links.
    for (link, target) in [
        ("lib64", "usr/lib64"),
        ("lib", "usr/lib"),
        ("bin", "usr/bin"),
    ] {
        if !at.join(link).exists() {
            symlink(target, at.join(link)).context("cannot make a link")?;
        }
    }
    // Directories of the host are mounted here.
    for dir in ["dev", "proc", "sys", "tmp"] {
        fs::create_dir_all(at.join(dir)).context("cannot make a directory")?;
    }
    Ok(())
}

/// Programs from Debian packages in a root directory of their own, with their own libraries.
#[derive(Clone, Debug)]
pub struct DebianPrograms(pub PathBuf);

impl DebianPrograms {
    /// The packages `packages`, from the cache under the name `key` or from the archive.
    pub fn get(cache: &Cache, key: &str, packages: &[&str]) -> Result<Self> {
        let root = cache.entry(key, &packages.join(", "), |at, step| {
            with_apt(cache, step, |apt| apt.unpack_closure(packages, at))?;
            complete_system(at)
        })?;
        Ok(Self(root))
    }

    /// The loader that goes with their libraries.
    pub fn loader(&self) -> PathBuf {
        self.0.join(LIBRARIES).join(LOADER)
    }

    /// A program, to be run with its own libraries whatever the machine has.
    pub fn command(&self, path: &str) -> Command {
        let mut command = Command::new(self.loader());
        command
            .arg("--library-path")
            .arg(self.0.join(LIBRARIES))
            .arg(self.0.join(path));
        command
    }

    /// The libraries of a program.
    pub fn libraries(&self, path: &str) -> Result<Vec<PathBuf>> {
        let list = run(Command::new(self.loader())
            .arg("--library-path")
            .arg(self.0.join(LIBRARIES))
            .arg("--list")
            .arg(self.0.join(path)))?;
        let library = |line: &str| Some(PathBuf::from(line.split_whitespace().nth(2)?));
        Ok(list.lines().filter_map(library).collect())
    }

    /// Writes a script into `dir` that runs a program of `usr/bin` under its own name, with these variables. `root` is
    /// the root directory as the script names it.
    fn script(&self, dir: &Path, root: &str, program: &str, variables: &str) -> Result<()> {
        // Names may be links of the alternatives system; only the file itself is sure to be there.
        let real = fs::canonicalize(self.0.join("usr/bin").join(program))
            .context(format!("the packages have no program {program}"))?;
        let file = real.file_name().unwrap_or_default().to_string_lossy();
        let text = format!(
            "#!/bin/sh\nroot={root}\nlibraries=$root/{LIBRARIES}\n{variables} exec \"$libraries/{LOADER}\" \
             --library-path \"$libraries\" --argv0 \"$0\" \"$root/usr/bin/{file}\" \"$@\"\n"
        );
        let path = dir.join(program);
        fs::write(&path, text).context("cannot write a script")?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
            .context("cannot make a script runnable")
    }
}

/// Programs that the build of a kernel needs besides a C compiler, and their packages. It needs no headers but
/// those of the C library.
const BUILD_PROGRAMS: [&str; 7] = ["make", "flex", "bison", "m4", "bc", "lz4", "xz"];
const BUILD_PACKAGES: &[&str] = &["make", "flex", "bison", "m4", "bc", "lz4", "xz-utils"];

/// A directory with [`BUILD_PROGRAMS`], to be looked through before all others.
pub(super) fn build_programs(cache: &Cache) -> Result<PathBuf> {
    const SCRIPTS: &str = "scripts";
    // Bison and flex look for their data and for m4 where they would be installed.
    const VARIABLES: &str = "BISON_PKGDATADIR=$root/usr/share/bison M4=$root/scripts/m4";
    let what = "make, flex, bison and others for the L1 kernel";
    let root = cache.entry("build-programs-1", what, |at, step| {
        with_apt(cache, step, |apt| apt.unpack_closure(BUILD_PACKAGES, at))?;
        let scripts = at.join(SCRIPTS);
        fs::create_dir(&scripts).context("cannot make a directory")?;
        for program in BUILD_PROGRAMS {
            DebianPrograms(at.into()).script(&scripts, "${0%/*}/..", program, VARIABLES)?;
        }
        Ok(())
    })?;
    Ok(root.join(SCRIPTS))
}

/// QEMU and its tools.
#[derive(Clone, Debug)]
pub struct Emulator(DebianPrograms);

impl Emulator {
    /// From the cache or the archive.
    pub fn get(cache: &Cache) -> Result<Self> {
        let root = cache.entry("emulator-1", "QEMU", |at, step| {
            with_apt(cache, step, |apt| apt.unpack_closure(EMULATOR, at))?;
            complete_system(at)
        })?;
        Ok(Self(DebianPrograms(root)))
    }

    /// The directory with its programs and libraries.
    pub fn root(&self) -> &Path {
        &self.0.0
    }

    /// Copies the parts that run the emulator, so that a benchmark reads nothing over the share.
    pub fn copied_to(&self, to: &Path) -> Result<Self> {
        for part in [
            "usr/bin",
            "usr/lib/x86_64-linux-gnu",
            "usr/share/qemu",
            "usr/share/seabios",
        ] {
            let dir = to.join(part);
            fs::create_dir_all(&dir).context("cannot make a directory")?;
            run(Command::new("cp")
                .arg("-a")
                .arg(self.root().join(part).join("."))
                .arg(&dir))?;
        }
        Ok(Self(DebianPrograms(to.into())))
    }

    /// A program of `usr/bin`.
    pub fn command(&self, program: &str) -> Command {
        let mut command = self.0.command(&format!("usr/bin/{program}"));
        command.env("QEMU_MODULE_DIR", self.root().join(LIBRARIES).join("qemu"));
        if program.starts_with("qemu-system") {
            for data in ["usr/share/qemu", "usr/share/seabios"] {
                command.arg("-L").arg(self.root().join(data));
            }
        }
        command
    }
}

/// socat and Python, which speak to the control API.
#[derive(Clone, Debug)]
pub struct ApiClients(DebianPrograms);

impl ApiClients {
    /// From the cache or the archive.
    pub fn get(cache: &Cache) -> Result<Self> {
        let root = cache.entry("api-clients-1", "socat and Python", |at, step| {
            with_apt(cache, step, |apt| {
                apt.unpack_closure(&["socat", "python3"], at)
            })
        })?;
        Ok(Self(DebianPrograms(root)))
    }

    /// Puts scripts named `socat` and `python3` that run the programs into `dir`.
    pub fn scripts(&self, dir: &Path) -> Result<()> {
        let root = self.0.0.display().to_string();
        for program in ["socat", "python3"] {
            self.0.script(dir, &root, program, "PYTHONHOME=$root/usr")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_plain_kernel_of_the_series_is_chosen() {
        let names = |list: &[&str]| {
            list.iter()
                .map(|name| format!("linux-binary-{name}"))
                .collect()
        };
        let list = [
            "7.2.9+deb13-amd64",
            "7.2.12+deb13-amd64",
            "7.2.12+deb13-cloud-amd64",
            "7.2.13+deb13-rt-amd64",
            "7.3.4+deb13-amd64",
        ];
        assert_eq!(
            newest(names(&list), "7.2.").unwrap(),
            "linux-binary-7.2.12+deb13-amd64"
        );
        assert_eq!(
            newest(names(&list), "9.9.").unwrap(),
            "linux-binary-7.3.4+deb13-amd64"
        );
        assert_eq!(newest(names(&["7.2.1-rt-amd64"]), "7.2."), None);
    }
}
