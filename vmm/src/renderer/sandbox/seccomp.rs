//! System calls that the renderer cannot make, by seccomp.
//!
//! The list names refused calls, not allowed ones: drivers of untested hardware may make calls that are unknown here.
//!
//! The renderer cannot make, connect or accept sockets, except netlink sockets and socket pairs. One gap is left: from
//! a pair of datagram sockets it can send to any datagram socket whose path its user may write to.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::SandboxError;

/// System calls that no driver makes: on other processes, mounts, namespaces, kernel settings, the clock, and
/// connections to other programs.
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
/// Bit in the numbers of x32 system calls, which do the same.
const X32: i64 = 0x4000_0000;

/// Installs the filter for this thread and all that it starts.
pub fn filter() -> Result<(), SandboxError> {
    let mut rules = BTreeMap::new();
    for &call in REFUSED {
        add(&mut rules, call, Vec::new());
    }
    // libudev listens to the kernel by netlink. Other families reach other programs and machines.
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
    // clone3 has its flags in memory, which a filter cannot read. After ENOSYS the C library calls clone.
    let mut rules = BTreeMap::new();
    add(&mut rules, libc::SYS_clone3, Vec::new());
    apply(rules, libc::ENOSYS)
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Refuses a call if one of the rules holds, or always without rules.
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
