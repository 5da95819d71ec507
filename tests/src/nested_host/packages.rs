//! Debian packages without installing any: a private apt configuration downloads and verifies, and
//! `dpkg-deb` unpacks. Needs no root, and changes nothing of the machine's.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::Cache;
use crate::{Context, Failure, Result};

/// What the emulator, its tools and busybox come from. The suffix holds all of QEMU to one suite.
const EMULATOR: &[&str] = &[
    "qemu-system-x86/trixie-backports",
    "qemu-system-common/trixie-backports",
    "qemu-system-data/trixie-backports",
    "seabios/trixie-backports",
    "qemu-utils/trixie-backports",
    "iproute2",
];
/// Kernel series that the nested host is tested with; a newer one is taken when it is gone.
const SERIES: &str = "7.2.";
/// Names a mirror where the machine's apt knows none.
const MIRROR: &str = "FANLIGHT_DEBIAN_MIRROR";
const KEYRING: &str = "usr/share/keyrings/debian-archive-keyring.gpg";
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// Runs a command to its end; its standard output, or its last lines of error.
pub fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .context(format!("cannot run {name}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let error = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<_> = error.lines().rev().take(4).collect();
    let lines: Vec<_> = lines.into_iter().rev().collect();
    Err(Failure::new(
        format!("{name} failed ({})", output.status),
        lines.join(" / "),
    ))
}

/// A private apt.
struct Apt {
    config: PathBuf,
}

impl Apt {
    /// Reads the lists of these suites.
    fn new(dir: &Path, suites: &[&str]) -> Result<Self> {
        for sub in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(sub)).context("cannot make apt's directories")?;
        }
        fs::write(dir.join("status"), "").context("cannot write apt's status")?;
        let (mirror, keyring) = (mirror(dir)?, keyring(dir)?);
        let line = |suite: &str| {
            format!(
                "deb [arch=amd64 signed-by={}] {mirror} {suite} main\n",
                keyring.display()
            )
        };
        let sources: String = suites.iter().map(|suite| line(suite)).collect();
        fs::write(dir.join("sources.list"), sources).context("cannot write apt's sources")?;
        let at = dir.display();
        let text = format!(
            r#"Dir::Etc::sourcelist "{at}/sources.list"; Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null"; Dir::Etc::preferencesparts "/dev/null";
Dir::State "{at}/state"; Dir::State::status "{at}/status"; Dir::Cache "{at}/cache";
APT::Architecture "amd64"; APT::Architectures "amd64"; APT::Install-Recommends "false";
APT::Sandbox::User "root"; Acquire::Languages "none"; Acquire::Retries "3";
"#
        );
        let config = dir.join("apt.conf");
        fs::write(&config, text).context("cannot write apt's configuration")?;
        let apt = Self { config };
        run(apt.command("apt-get").arg("update"))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.config);
        command
    }

    /// Downloads packages with all that they need, and unpacks them into `root`.
    fn unpack_closure(&self, packages: &[&str], root: &Path) -> Result<()> {
        run(self
            .command("apt-get")
            .args(["--yes", "--download-only", "install"])
            .args(packages))?;
        let archives = self.config.with_file_name("cache/archives");
        unpack_all(&archives, root)
    }

    /// Downloads packages alone, and unpacks them into `root`.
    fn unpack(&self, packages: &[&str], root: &Path) -> Result<()> {
        let dir = tempfile::tempdir_in(self.config.parent().unwrap_or(Path::new(".")))
            .context("cannot make a directory")?;
        run(self
            .command("apt-get")
            .arg("download")
            .args(packages)
            .current_dir(dir.path()))?;
        unpack_all(dir.path(), root)
    }

    /// Names of packages that start with `prefix`.
    fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let names = run(self.command("apt-cache").args(["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }
}

fn unpack_all(archives: &Path, root: &Path) -> Result<()> {
    for entry in fs::read_dir(archives).context("cannot list packages")? {
        let path = entry.context("cannot list packages")?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            run(Command::new("dpkg-deb").arg("-x").arg(&path).arg(root))?;
        }
    }
    Ok(())
}

/// The Debian mirror that this machine uses. Where its apt is another distribution's, the one that
/// debootstrap has by default.
fn mirror(dir: &Path) -> Result<String> {
    if let Ok(mirror) = std::env::var(MIRROR) {
        return Ok(mirror);
    }
    let targets = run(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(ORIGIN) $(REPO_URI)",
        "Created-By: Packages",
    ]))?;
    let own = targets
        .lines()
        .filter_map(|line| line.strip_prefix("Debian "))
        .find(|uri| !uri.contains("security"));
    if let Some(uri) = own {
        return Ok(uri.to_owned());
    }
    let root = foreign(dir, "debootstrap")?;
    let script = fs::read_to_string(root.join("usr/sbin/debootstrap"))
        .context("cannot read debootstrap")?
        + &fs::read_to_string(root.join("usr/share/debootstrap/scripts/sid")).unwrap_or_default()
        + &fs::read_to_string(root.join("usr/share/debootstrap/scripts/debian-common"))
            .unwrap_or_default();
    script
        .split(|c: char| c.is_whitespace() || c == '"' || c == '\'')
        .map(|word| word.trim_start_matches("DEF_MIRROR="))
        .find(|word| word.starts_with("http") && word.trim_end_matches('/').ends_with("/debian"))
        .map(str::to_owned)
        .ok_or_else(|| Failure(format!("no Debian mirror is known: set {MIRROR} to one")))
}

/// The keys that Debian's archive is signed with.
fn keyring(dir: &Path) -> Result<PathBuf> {
    let own = Path::new("/").join(KEYRING);
    if own.exists() {
        return Ok(own);
    }
    Ok(foreign(dir, "debian-archive-keyring")?.join(KEYRING))
}

/// Unpacks a package of the machine's own distribution, through its own apt.
fn foreign(dir: &Path, package: &str) -> Result<PathBuf> {
    let (download, root) = (dir.join("foreign-debs"), dir.join("foreign"));
    for path in [&download, &root] {
        fs::create_dir_all(path).context("cannot make a directory")?;
    }
    run(Command::new("apt-get")
        .args(["download", package])
        .current_dir(&download))
    .context(format!("cannot get {package}; run `apt-get update` first"))?;
    unpack_all(&download, &root)?;
    Ok(root)
}

/// busybox, linked statically: the guest's and L1's shell.
#[derive(Clone, Debug)]
pub struct Busybox(pub PathBuf);

impl Busybox {
    /// From the cache or the archive.
    pub fn get(cache: &Cache) -> Result<Self> {
        let root = cache.entry("busybox-1", "downloading busybox", |at| {
            with_apt(at, |apt| apt.unpack(&["busybox-static"], at))
        })?;
        Ok(Self(root.join("usr/bin/busybox")))
    }
}

/// Runs `work` with an apt of trixie and its backports, whose directories are gone after.
fn with_apt(at: &Path, work: impl FnOnce(&Apt) -> Result<()>) -> Result<()> {
    with_apt_of(&["trixie", "trixie-backports"], at, work)
}

fn with_apt_of(suites: &[&str], at: &Path, work: impl FnOnce(&Apt) -> Result<()>) -> Result<()> {
    let dir = at.join("apt");
    work(&Apt::new(&dir, suites)?)?;
    fs::remove_dir_all(&dir).context("cannot remove apt's directories")
}

/// A distribution's kernel with its modules.
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
        let root = cache.entry("stock-kernel-1", "downloading Debian's kernel", |at| {
            with_apt(at, |apt| {
                let binary = newest(apt.names("linux-binary-")?, SERIES)
                    .ok_or_else(|| Failure("the archive has no linux-binary-*-amd64".into()))?;
                let modules = binary.replace("linux-binary-", "linux-modules-");
                apt.unpack(&[&binary, &modules], at)
            })
        })?;
        let versions = root.join("usr/lib/modules");
        let modules = fs::read_dir(&versions)
            .context("cannot look at the kernel's modules")?
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

/// The kernel's source, as the archive has it.
pub fn kernel_source(cache: &Cache) -> Result<PathBuf> {
    let root = cache.entry(
        "kernel-source-1",
        "downloading the nested host's kernel source",
        |at| {
            with_apt(at, |apt| {
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
        },
    )?;
    fs::read_dir(root.join("usr/src"))
        .context("cannot look for the kernel's source")?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "xz"))
        .ok_or_else(|| Failure("the kernel's source has no archive".into()))
}

/// Unpacks packages with all that they need, as a system that programs can run in.
fn unpack_system(packages: &[&str], at: &Path) -> Result<()> {
    with_apt(at, |apt| apt.unpack_closure(packages, at))?;
    complete_system(at)
}

/// Gives unpacked packages what makes a system of them.
fn complete_system(at: &Path) -> Result<()> {
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
    // What a program in there sees of the host is mounted here.
    for dir in ["dev", "proc", "sys", "tmp"] {
        fs::create_dir_all(at.join(dir)).context("cannot make a directory")?;
    }
    Ok(())
}

/// The same for a root that Fanlight runs in, with what it needs of its host in the nested host.
fn complete_host(at: &Path) -> Result<()> {
    complete_system(at)?;
    for dir in ["share", "cache"] {
        fs::create_dir_all(at.join(dir)).context("cannot make a directory")?;
    }
    Ok(())
}

/// Debian programs that guests run, in a root directory of their own.
#[derive(Clone, Debug)]
pub struct DebianPrograms(pub PathBuf);

impl DebianPrograms {
    /// The packages `packages`, from the cache under the name `key` or from the archive.
    pub fn get(cache: &Cache, key: &str, packages: &[&str]) -> Result<Self> {
        let what = format!("downloading {}", packages.join(", "));
        let root = cache.entry(key, &what, |at| unpack_system(packages, at))?;
        Ok(Self(root))
    }

    /// The loader that goes with their libraries.
    pub fn loader(&self) -> PathBuf {
        self.0.join(LIBRARIES).join("ld-linux-x86-64.so.2")
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
}

/// What a host needs to draw for its guests, and a guest to have it drawn, without a GPU: virglrenderer with
/// its server, and Mesa with its software rasterizers.
const RENDERER: &[&str] = &[
    "libvirglrenderer1",
    "virgl-server",
    "mesa-vulkan-drivers",
    "libegl1",
    "libegl-mesa0",
    "libgles2",
];
/// Programs that say what they find of it, and one that makes a disk of it.
const PROGRAMS: &[&str] = &["vulkan-tools", "mesa-utils-bin", "e2fsprogs"];
/// What QEMU needs besides for 3D.
const EMULATOR_GL: &[&str] = &[
    "qemu-system-modules-opengl/trixie-backports",
    "libgbm1",
    "libopengl0",
    "libgl1-mesa-dri",
];
/// The suite with virglrenderer 1.3.
const GRAPHICS_SUITE: &str = "sid";

/// Debian's graphics as a root directory, for hosts, and as a disk, for guests.
#[derive(Clone, Debug)]
pub struct GraphicsStack {
    /// The root directory.
    pub root: PathBuf,
    /// The same in an ext4 image.
    pub image: PathBuf,
}

impl GraphicsStack {
    /// From the cache or the archive.
    pub fn get(cache: &Cache) -> Result<Self> {
        const IMAGE: &str = "disk";
        let root = cache.entry("graphics-1", "downloading Mesa and virglrenderer", |at| {
            with_apt_of(&[GRAPHICS_SUITE], at, |apt| {
                apt.unpack_closure(&[RENDERER, PROGRAMS].concat(), at)
            })?;
            complete_host(at)
        })?;
        let disk = cache.entry("graphics-disk-1", "making a disk with Mesa", |at| {
            let libraries = root.join(LIBRARIES);
            run(Command::new(libraries.join("ld-linux-x86-64.so.2"))
                .arg("--library-path")
                .arg(&libraries)
                .arg(root.join("usr/sbin/mke2fs"))
                .args(["-q", "-t", "ext4", "-O", "^has_journal", "-d"])
                .arg(&root)
                .arg(at.join(IMAGE))
                .arg("1G"))
            .map(drop)
        })?;
        Ok(Self {
            root,
            image: disk.join(IMAGE),
        })
    }

    /// The root of a host with virglrenderer 1.1, of the suite before, and the same image.
    pub fn older(cache: &Cache) -> Result<Self> {
        let what = "downloading virglrenderer 1.1";
        let root = cache.entry("graphics-older-1", what, |at| {
            // Its OpenGL loader looks for a library that its package does not ask for.
            let packages = [RENDERER, &["libopengl0"]].concat();
            with_apt(at, |apt| apt.unpack_closure(&packages, at))?;
            complete_host(at)
        })?;
        let Self { image, .. } = Self::get(cache)?;
        Ok(Self { root, image })
    }

    /// A root with QEMU's 3D, of the emulator's own suites and so with their virglrenderer; there is no disk.
    pub fn of_emulator(cache: &Cache) -> Result<Self> {
        let root = cache.entry("emulator-gl-1", "downloading QEMU's 3D", |at| {
            let packages = [EMULATOR, EMULATOR_GL, RENDERER].concat();
            with_apt(at, |apt| apt.unpack_closure(&packages, at))?;
            complete_system(at)
        })?;
        let image = PathBuf::new();
        Ok(Self { root, image })
    }

    /// Shows these directories of the machine's to programs in the root, besides those that all need.
    pub fn show(&self, dirs: impl IntoIterator<Item = PathBuf>) -> Result<()> {
        let system = ["/dev", "/proc", "/sys", "/tmp"].map(PathBuf::from);
        for dir in system.into_iter().chain(dirs) {
            let to = self.root.join(dir.strip_prefix("/").unwrap_or(&dir));
            fs::create_dir_all(&to).context("cannot make a directory")?;
            rustix::mount::mount_bind(&dir, &to)
                .context(format!("cannot show {} to Fanlight", dir.display()))?;
        }
        Ok(())
    }

    /// A program that sees the root as its own, with Mesa's software drivers.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("chroot");
        command
            .arg(&self.root)
            .arg(program)
            .env("LD_LIBRARY_PATH", "/usr/lib/x86_64-linux-gnu")
            // Of all drivers the one that needs no hardware: looking for it takes time.
            .env("VK_DRIVER_FILES", "/usr/share/vulkan/icd.d/lvp_icd.json");
        command
    }
}

/// QEMU and its tools, run through their own libraries whatever the machine has.
#[derive(Clone, Debug)]
pub struct Emulator {
    root: PathBuf,
}

impl Emulator {
    /// From the cache or the archive.
    pub fn get(cache: &Cache) -> Result<Self> {
        let root = cache.entry("emulator-1", "downloading QEMU", |at| {
            unpack_system(EMULATOR, at)
        })?;
        Ok(Self { root })
    }

    /// The directory with its programs and libraries.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The parts that run the emulator, copied: what is measured reads nothing over the share.
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
                .arg(self.root.join(part).join("."))
                .arg(&dir))?;
        }
        Ok(Self { root: to.into() })
    }

    /// A program of `usr/bin`.
    pub fn command(&self, program: &str) -> Command {
        let libraries = self.root.join(LIBRARIES);
        let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
        command
            .env("QEMU_MODULE_DIR", libraries.join("qemu"))
            .arg("--library-path")
            .arg(&libraries)
            .arg(self.root.join("usr/bin").join(program));
        if program.starts_with("qemu-system") {
            for data in ["usr/share/qemu", "usr/share/seabios"] {
                command.arg("-L").arg(self.root.join(data));
            }
        }
        command
    }
}

/// Programs that speak to the control API.
const CLIENTS: &[&str] = &["socat", "python3"];

/// socat and Python, run through their own libraries whatever the machine has.
#[derive(Clone, Debug)]
pub struct ApiClients {
    root: PathBuf,
}

impl ApiClients {
    /// From the cache or the archive.
    pub fn get(cache: &Cache) -> Result<Self> {
        let root = cache.entry("api-clients-1", "downloading socat and Python", |at| {
            with_apt(at, |apt| apt.unpack_closure(CLIENTS, at))
        })?;
        Ok(Self { root })
    }

    /// Puts scripts named `socat` and `python3` that run the programs into `dir`.
    pub fn scripts(&self, dir: &Path) -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let libraries = self.root.join(LIBRARIES);
        for name in ["socat", "python3"] {
            // Names may be links of the archive's alternatives; these two are the programs themselves.
            let program = fs::canonicalize(self.root.join("usr/bin").join(name))
                .context(format!("no {name} in the archive's packages"))?;
            let text = format!(
                "#!/bin/sh\nPYTHONHOME={} exec {} --library-path {} {} \"$@\"\n",
                self.root.join("usr").display(),
                libraries.join("ld-linux-x86-64.so.2").display(),
                libraries.display(),
                program.display(),
            );
            let path = dir.join(name);
            fs::write(&path, text).context("cannot write a script")?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
                .context("cannot make a script runnable")?;
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
