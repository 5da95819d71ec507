//! Files that the renderer can open, by Landlock.
//!
//! It reads and executes programs and libraries, and reads /etc, /proc and /sys. It writes only to devices: GPUs, and
//! the DMA heaps, udmabuf, shm, null and random devices that drivers use. It reaches no abstract UNIX socket.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, path_beneath_rules,
};

/// Programs and libraries: to read and execute.
const PROGRAMS: &[&str] = &[
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/sbin",
    "/opt",
    "/nix/store",
    "/gnu/store",
];
/// What drivers read besides.
const READ: &[&str] = &["/etc", "/proc", "/sys", "/run/opengl-driver", "/run/udev"];
/// Devices in /dev to read, write and control; also those whose names begin with one of these.
const DEVICES: &[&str] = &[
    "dri", "dma_heap", "full", "kfd", "nvidia", "null", "random", "shm", "udmabuf", "urandom",
    "zero",
];
/// Environment variables that name files of drivers elsewhere: to read and execute.
const PATHS: &[&str] = &[
    "GBM_BACKENDS_PATH",
    "LD_LIBRARY_PATH",
    "LIBGL_DRIVERS_PATH",
    "RENDER_SERVER_EXEC_PATH",
    "VK_ADD_DRIVER_FILES",
    "VK_DRIVER_FILES",
    "VK_ICD_FILENAMES",
    "__EGL_VENDOR_LIBRARY_DIRS",
    "__EGL_VENDOR_LIBRARY_FILENAMES",
];

/// Restricts files. Kernels with an older Landlock enforce the part that they know.
pub fn restrict() -> Result<(), RulesetError> {
    const KNOWN: ABI = ABI::V6;
    let all = AccessFs::from_all(KNOWN);
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let run = read | AccessFs::Execute;
    let device = read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
    let rules = Ruleset::default()
        .handle_access(all)?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?;
    let rules = allow(rules, PROGRAMS.iter().map(PathBuf::from), run)?;
    let rules = allow(rules, READ.iter().map(PathBuf::from), read)?;
    let rules = allow(rules, named(), run)?;
    let rules = allow(rules, [PathBuf::from("/dev")], AccessFs::ReadDir.into())?;
    let rules = allow(rules, devices(), device)?;
    if rules.restrict_self()?.ruleset == RulesetStatus::NotEnforced {
        tracing::warn!(
            "the GPU's renderer can open what its user can: this kernel has no Landlock, or lsm= leaves it out"
        );
    }
    Ok(())
}

/// Allows access to those of `paths` that exist.
fn allow(
    rules: RulesetCreated,
    paths: impl IntoIterator<Item = PathBuf>,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    rules.add_rules(path_beneath_rules(paths, access))
}

/// Files and directories that the environment names.
fn named() -> Vec<PathBuf> {
    let values = PATHS.iter().filter_map(env::var_os);
    let paths = values.flat_map(|value| env::split_paths(&value).collect::<Vec<_>>());
    paths.filter(|path| path.is_absolute()).collect()
}

/// Devices in /dev that drivers use.
fn devices() -> Vec<PathBuf> {
    let is_known = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        DEVICES.iter().any(|known| name.starts_with(known))
    };
    let all = fs::read_dir("/dev").into_iter().flatten().flatten();
    all.map(|entry| entry.path())
        .filter(|path| is_known(path))
        .collect()
}
