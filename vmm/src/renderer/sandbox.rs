//! What the renderer's process may not do, whatever a guest's command streams make of the library: no new privileges,
//! no capabilities, files of the system and of GPUs only, and no system call that drivers have no use for.
//!
//! It is a list of what is refused and not of what is allowed: which calls a driver makes, of a maker whose hardware
//! nobody here has, cannot be known. Those that are started from here inherit it all.

use std::{
    collections::BTreeMap,
    env, fs, io,
    path::{Path, PathBuf},
};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, path_beneath_rules,
};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use thiserror::Error;

/// Why a part of it does not hold.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// Privileges.
    #[error("cannot drop privileges")]
    Privileges(#[from] rustix::io::Errno),
    /// Files.
    #[error("cannot restrict files")]
    Files(#[from] RulesetError),
    /// System calls: the list.
    #[error("cannot make a filter of system calls")]
    Filter(#[from] seccompiler::BackendError),
    /// System calls: the kernel.
    #[error("cannot filter system calls")]
    Apply(#[from] seccompiler::Error),
    /// The arguments of drivers' calls cannot be looked at.
    #[error("this is no x86-64")]
    Arch(#[from] io::Error),
}

/// Where programs and libraries are.
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
/// What drivers read.
const READ: &[&str] = &["/etc", "/proc", "/sys", "/run/opengl-driver", "/run/udev"];
/// Devices; others whose names start like these are too.
const DEVICES: &[&str] = &[
    "dri", "dma_heap", "full", "kfd", "nvidia", "null", "random", "shm", "udmabuf", "urandom",
    "zero",
];
/// Variables that tell of files of drivers' elsewhere.
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

/// What no driver calls: other processes, mounts, namespaces, the kernel's own, the machine's clock, and ways to
/// other programs.
const REFUSED: &[libc::c_long] = &[
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_fsconfig,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_open_by_handle_at,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_connect,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
];
/// Bit of the numbers of calls of x32 programs, which do the same.
const X32: i64 = 0x4000_0000;

/// Confines this thread, and all that it starts. As much of it as can be, also after an error.
pub fn enter() -> Result<(), SandboxError> {
    rustix::thread::set_no_new_privs(true)?;
    let files = restrict_files();
    let privileges = drop_capabilities();
    let calls = filter_calls();
    files.and(privileges).and(calls)
}

fn drop_capabilities() -> Result<(), SandboxError> {
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    Ok(rustix::thread::set_capabilities(None, none)?)
}

/// Kernels that know less of it do less.
fn restrict_files() -> Result<(), SandboxError> {
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

/// What is not there is left out.
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

fn filter_calls() -> Result<(), SandboxError> {
    let mut rules = BTreeMap::new();
    for &call in REFUSED {
        add(&mut rules, call, Vec::new());
    }
    // libudev listens to the kernel. All others are for other programs and machines.
    let is_not = |family: libc::c_int| {
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, family as u64)
    };
    let other_family = SeccompRule::new(vec![is_not(libc::AF_NETLINK)?])?;
    add(&mut rules, libc::SYS_socket, vec![other_family]);
    let spaces = [
        libc::CLONE_NEWUSER,
        libc::CLONE_NEWNS,
        libc::CLONE_NEWNET,
        libc::CLONE_NEWPID,
        libc::CLONE_NEWIPC,
        libc::CLONE_NEWUTS,
        libc::CLONE_NEWCGROUP,
    ];
    let new_space = spaces.map(|flag| {
        let flag = u64::from(flag.cast_unsigned());
        let of = SeccompCmpOp::MaskedEq(flag);
        let condition = SeccompCondition::new(0, SeccompCmpArgLen::Qword, of, flag)?;
        SeccompRule::new(vec![condition])
    });
    let new_space = new_space.into_iter().collect::<Result<_, _>>()?;
    add(&mut rules, libc::SYS_clone, new_space);
    apply(rules, libc::EPERM)?;
    // Its flags are in memory, where a filter cannot see them: the C library then takes `clone`.
    let mut rules = BTreeMap::new();
    add(&mut rules, libc::SYS_clone3, Vec::new());
    apply(rules, libc::ENOSYS)
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn add(rules: &mut Rules, call: i64, when: Vec<SeccompRule>) {
    rules.insert(call | X32, when.clone());
    rules.insert(call, when);
}

fn apply(rules: Rules, error: libc::c_int) -> Result<(), SandboxError> {
    let refuse = SeccompAction::Errno(error as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, TargetArch::x86_64)?;
    let program: BpfProgram = filter.try_into()?;
    Ok(seccompiler::apply_filter(&program)?)
}

#[cfg(test)]
mod tests {
    use std::{io::ErrorKind, net::UdpSocket, os::unix::net::UnixStream, process::Command, thread};

    use super::*;

    /// What holds for one thread, and what it starts.
    fn inside<R: Send + 'static>(act: impl FnOnce() -> R + Send + 'static) -> R {
        let confined = thread::spawn(|| {
            enter().unwrap();
            act()
        });
        confined.join().unwrap()
    }

    #[test]
    fn drivers_can_work() {
        inside(|| {
            assert!(fs::read_dir("/usr/lib").is_ok());
            assert!(fs::read("/proc/self/maps").is_ok());
            assert!(fs::write("/dev/null", "x").is_ok());
            assert!(UnixStream::pair().is_ok());
            assert!(rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).is_ok());
            assert!(thread::spawn(|| 5).join().is_ok_and(|five| five == 5));
            assert!(
                Command::new("/bin/true")
                    .status()
                    .is_ok_and(|status| status.success())
            );
        });
    }

    #[test]
    fn other_programs_are_out_of_reach() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let refused = |error: io::Error| error.kind() == ErrorKind::PermissionDenied;
        inside(move || {
            assert!(UnixStream::connect(&socket).is_err_and(refused));
            assert!(UdpSocket::bind("127.0.0.1:0").is_err_and(refused));
            for flags in [libc::CLONE_NEWUSER, libc::CLONE_NEWUSER | libc::CLONE_FS] {
                // SAFETY: it is refused; otherwise the child would end at once.
                let result = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
                if result == 0 {
                    // SAFETY: ends the child.
                    unsafe { libc::_exit(0) };
                }
                assert_eq!(result, -1);
            }
            // SAFETY: it is refused.
            let traced = unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
            assert_eq!(traced, -1);
            let status = fs::read_to_string("/proc/thread-self/status").unwrap();
            for line in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000"] {
                assert!(status.contains(line), "{status}");
            }
        });
    }
}
