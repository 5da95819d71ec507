//! The renderer's sandbox, which confines all that a guest's command streams make the library do. It allows no new
//! privileges, no capabilities, and only files of the system and of GPUs ([`landlock`]). It refuses system calls that
//! no driver needs ([`seccomp`]). Programs that the renderer starts inherit it.

mod landlock;
mod seccomp;

use ::landlock::RulesetError;
use rustix::thread::{CapabilitySet, CapabilitySets};
use thiserror::Error;

/// Why a part of the sandbox does not hold.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// Capabilities or `no_new_privs`.
    #[error("cannot drop privileges")]
    Privileges(#[from] rustix::io::Errno),
    /// Files.
    #[error("cannot restrict files")]
    Files(#[from] RulesetError),
    /// The filter of system calls is wrong.
    #[error("cannot make a filter of system calls")]
    Filter(#[from] seccompiler::BackendError),
    /// The kernel refuses the filter of system calls.
    #[error("cannot filter system calls")]
    Apply(#[from] seccompiler::Error),
}

/// Confines this thread and all that it starts. After an error the other parts still hold.
pub fn enter() -> Result<(), SandboxError> {
    rustix::thread::set_no_new_privs(true)?;
    let files = landlock::restrict().map_err(SandboxError::Files);
    let privileges = drop_capabilities();
    let calls = seccomp::filter();
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

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{self, ErrorKind},
        net::UdpSocket,
        os::unix::net::UnixStream,
        process::Command,
        thread,
    };

    use super::*;

    /// Runs `act` on a confined thread.
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
            // No arguments are good for anything, should a call be allowed.
            for call in [
                libc::SYS_process_vm_readv,
                libc::SYS_process_vm_writev,
                libc::SYS_pidfd_getfd,
                libc::SYS_kcmp,
                libc::SYS_io_uring_setup,
                libc::SYS_io_uring_enter,
                libc::SYS_io_uring_register,
                libc::SYS_userfaultfd,
                libc::SYS_bpf,
                libc::SYS_perf_event_open,
                libc::SYS_keyctl,
                libc::SYS_add_key,
                libc::SYS_request_key,
                libc::SYS_connect,
                libc::SYS_listen,
                libc::SYS_accept,
                libc::SYS_accept4,
                libc::SYS_setns,
                libc::SYS_open_tree,
            ] {
                // SAFETY: no descriptor, process or address is -1.
                let result = unsafe { libc::syscall(call, -1, -1, -1, -1, -1, -1) };
                let error = io::Error::last_os_error().raw_os_error();
                assert_eq!(
                    (result, error),
                    (-1, Some(libc::EPERM)),
                    "system call {call}"
                );
            }
            // SAFETY: a null pointer is no set of arguments.
            let result = unsafe { libc::syscall(libc::SYS_clone3, 0, 0) };
            let error = io::Error::last_os_error().raw_os_error();
            assert_eq!((result, error), (-1, Some(libc::ENOSYS)));
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
