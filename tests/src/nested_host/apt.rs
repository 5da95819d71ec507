//! Debian packages without installing any: a private apt configuration downloads and verifies, and
//! `dpkg-deb` unpacks. Needs no root, and changes nothing on the machine.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use rustix::fs::{FlockOperation, flock};

use super::{
    Cache,
    command::{run, run_lines},
};
use crate::{Context, Failure, Result, progress::Step};

/// Names a mirror, where the apt configuration of the machine names none.
const MIRROR: &str = "FANLIGHT_DEBIAN_MIRROR";
const KEYRING: &str = "usr/share/keyrings/debian-archive-keyring.gpg";
/// Package lists that are younger are not asked for again: a first run makes ten entries of the cache.
const FRESH: Duration = Duration::from_secs(3600);

/// A private apt with its lists in the cache.
pub(super) struct Apt<'a> {
    config: PathBuf,
    mirror: String,
    step: &'a Step,
    /// Held: two processes do not use one apt at once.
    _lock: File,
}

impl<'a> Apt<'a> {
    /// Reads the package lists of these suites. `step` shows what is done.
    pub(super) fn new(cache: &Cache, suites: &[&str], step: &'a Step) -> Result<Self> {
        let dir = cache.root().join(format!("apt-{}", suites.join("-")));
        fs::create_dir_all(dir.join("state/lists/partial"))
            .context("cannot make directories for apt")?;
        let lock = File::create(dir.join("lock")).context("cannot make a lock file")?;
        flock(&lock, FlockOperation::LockExclusive).context("cannot lock the apt directories")?;
        fs::write(dir.join("status"), "").context("cannot write the apt status")?;
        let (mirror, keyring) = (mirror(&dir)?, keyring(&dir)?);
        let line = |suite: &str| {
            format!(
                "deb [arch=amd64 signed-by={}] {mirror} {suite} main\n",
                keyring.display()
            )
        };
        let sources: String = suites.iter().map(|suite| line(suite)).collect();
        let list = dir.join("sources.list");
        let is_new = fs::read_to_string(&list).ok().as_ref() != Some(&sources);
        fs::write(&list, sources).context("cannot write the apt sources")?;
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
        fs::write(&config, text).context("cannot write the apt configuration")?;
        let apt = Self {
            config,
            mirror,
            step,
            _lock: lock,
        };
        let updated = dir.join("updated");
        if is_new || !is_fresh(&updated) {
            step.detail("reading the package lists");
            apt.fetch(
                "the package lists",
                apt.command("apt-get").args(["update", "--error-on=any"]),
            )?;
            fs::write(&updated, "").context("cannot write the apt status")?;
        }
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.config);
        command
    }

    /// Runs a command that reads from the mirror.
    fn fetch(&self, what: &str, command: &mut Command) -> Result<String> {
        run(command).context(format!(
            "cannot fetch {what} from {}; check the connection, or set {MIRROR} to another mirror of Debian",
            self.mirror
        ))
    }

    /// Downloads packages with all that they need, and unpacks them into `root`.
    pub(super) fn unpack_closure(&self, packages: &[&str], root: &Path) -> Result<()> {
        self.unpack_by(&["--yes", "--download-only", "install"], packages, root)
    }

    /// Downloads packages alone, and unpacks them into `root`.
    pub(super) fn unpack(&self, packages: &[&str], root: &Path) -> Result<()> {
        self.unpack_by(&["download"], packages, root)
    }

    /// Unpacks into `root` what `apt-get` downloads with `options`.
    fn unpack_by(&self, options: &[&str], packages: &[&str], root: &Path) -> Result<()> {
        let archives = root.join("debs");
        fs::create_dir_all(archives.join("partial")).context("cannot make directories for apt")?;
        let command = || {
            let mut command = self.command("apt-get");
            command
                .arg("-o")
                .arg(format!("Dir::Cache::archives={}", archives.display()))
                .args(options)
                .args(packages)
                .current_dir(&archives);
            command
        };
        let what = packages.join(", ");
        let files = self.fetch(&what, command().arg("--print-uris"))?;
        let (count, bytes) = total(&files);
        let (megabytes, s) = (bytes.div_ceil(1_000_000), if count == 1 { "" } else { "s" });
        let what_comes = format!("downloading {count} package{s}");
        self.step.detail(format!("{what_comes}, {megabytes} MB"));
        self.step.watch(
            || {
                format!(
                    "{what_comes}, {} of {megabytes} MB",
                    size_below(&archives) / 1_000_000
                )
            },
            || self.fetch(&what, &mut command()),
        )?;
        self.step.detail("unpacking");
        unpack_all(&archives, root)?;
        fs::remove_dir_all(&archives).context("cannot remove the packages")
    }

    /// Names of packages that start with `prefix`.
    pub(super) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let mut names = Vec::new();
        let mut command = self.command("apt-cache");
        run_lines(command.args(["pkgnames", prefix]), |name| {
            names.push(name.to_owned())
        })?;
        Ok(names)
    }
}

fn is_fresh(stamp: &Path) -> bool {
    let modified = fs::metadata(stamp).and_then(|metadata| metadata.modified());
    modified.is_ok_and(|at| {
        SystemTime::now()
            .duration_since(at)
            .is_ok_and(|age| age < FRESH)
    })
}

/// Number and bytes of the files that `--print-uris` lists, a line each: URI, name, size, checksum.
fn total(list: &str) -> (usize, u64) {
    let sizes = list
        .lines()
        .filter(|line| line.starts_with('\''))
        .filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok());
    sizes.fold((0, 0), |(count, bytes), size| (count + 1, bytes + size))
}

/// Bytes of the files in a directory and in those directly below.
fn size_below(dir: &Path) -> u64 {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten();
    let sizes = entries(dir).map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => entries(&entry.path())
            .filter_map(|entry| Some(entry.metadata().ok()?.len()))
            .sum(),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    sizes.sum()
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
    ]))
    .context("the tests take what they run from Debian packages, which needs apt and dpkg")?;
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

/// The keys that sign the Debian archive.
fn keyring(dir: &Path) -> Result<PathBuf> {
    let own = Path::new("/").join(KEYRING);
    if own.exists() {
        return Ok(own);
    }
    Ok(foreign(dir, "debian-archive-keyring")?.join(KEYRING))
}

/// Unpacks a package of the distribution that this machine has, through the apt of that.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_what_is_to_come_are_added() {
        let list = "Reading package lists...\n\
            'http://deb.debian.org/debian/pool/m4_1.deb' m4_1.deb 293956 SHA256:ab\n\
            'http://deb.debian.org/debian/pool/bc_1.deb' bc_1.deb 44 SHA256:cd\n";
        assert_eq!(total(list), (2, 294_000));
        assert_eq!(total("Reading package lists...\n"), (0, 0));
    }
}
