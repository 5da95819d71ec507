//! Debian's graphics: virglrenderer for hosts, Mesa for guests, both without a GPU.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::{
    Cache, DebianPrograms,
    command::run,
    packages::{EMULATOR, complete_system, with_apt, with_apt_of},
};
use crate::{Context, Result};

/// Packages with which a host draws for its guests without a GPU, and guests use it: virglrenderer with its server, and
/// Mesa with its software rasterizers.
const RENDERER: &[&str] = &[
    "libvirglrenderer1",
    "virgl-server",
    "mesa-vulkan-drivers",
    "libegl1",
    "libegl-mesa0",
    "libgles2",
];
/// Programs that report on it, and one that makes a disk of it.
const PROGRAMS: &[&str] = &["vulkan-tools", "mesa-utils-bin", "e2fsprogs"];
/// What QEMU needs for 3D besides.
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
        let root = cache.entry("graphics-1", "Mesa and virglrenderer", |at, step| {
            with_apt_of(&[GRAPHICS_SUITE], cache, step, |apt| {
                apt.unpack_closure(&[RENDERER, PROGRAMS].concat(), at)
            })?;
            complete_host(at)
        })?;
        let disk = cache.entry("graphics-disk-1", "a disk with Mesa", |at, _| {
            run(DebianPrograms(root.clone())
                .command("usr/sbin/mke2fs")
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

    /// The root of a host with virglrenderer 1.1, from the suite before, and the same image.
    pub fn older(cache: &Cache) -> Result<Self> {
        let what = "virglrenderer 1.1";
        let root = cache.entry("graphics-older-1", what, |at, step| {
            // Its OpenGL loader looks for a library that its package does not ask for.
            let packages = [RENDERER, &["libopengl0"]].concat();
            with_apt(cache, step, |apt| apt.unpack_closure(&packages, at))?;
            complete_host(at)
        })?;
        let Self { image, .. } = Self::get(cache)?;
        Ok(Self { root, image })
    }

    /// A root with QEMU and its 3D, from the same suites as the emulator and so with their virglrenderer. It has no disk.
    pub fn of_emulator(cache: &Cache) -> Result<Self> {
        let root = cache.entry("emulator-gl-1", "QEMU with 3D", |at, step| {
            let packages = [EMULATOR, EMULATOR_GL, RENDERER].concat();
            with_apt(cache, step, |apt| apt.unpack_closure(&packages, at))?;
            complete_system(at)
        })?;
        let image = PathBuf::new();
        Ok(Self { root, image })
    }

    /// Mounts these directories of the machine in the root, besides those that every program needs.
    pub fn show(&self, dirs: impl IntoIterator<Item = PathBuf>) -> Result<()> {
        let system = ["/dev", "/proc", "/sys", "/tmp"].map(PathBuf::from);
        for dir in system.into_iter().chain(dirs) {
            let to = self.root.join(dir.strip_prefix("/").unwrap_or(&dir));
            fs::create_dir_all(&to).context("cannot make a directory")?;
            rustix::mount::mount_bind(&dir, &to)
                .context(format!("cannot mount {} for Fanlight", dir.display()))?;
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
            // The one driver that needs no hardware: a search takes time.
            .env("VK_DRIVER_FILES", "/usr/share/vulkan/icd.d/lvp_icd.json");
        command
    }
}

/// Completes a root that Fanlight runs in: the shares of the nested host are mounted there too.
fn complete_host(at: &Path) -> Result<()> {
    complete_system(at)?;
    for dir in ["share", "cache"] {
        fs::create_dir_all(at.join(dir)).context("cannot make a directory")?;
    }
    Ok(())
}
