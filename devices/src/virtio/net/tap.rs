//! A tap interface of the host (Linux `Documentation/networking/tuntap.rst`).

use std::{
    fs::{File, OpenOptions},
    io::{self, ErrorKind},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

use thiserror::Error;
use vmm_sys_util::{
    ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val},
    ioctl_ior_nr, ioctl_iow_nr,
};

/// `struct virtio_net_hdr_v1`, before every frame.
pub const HEADER_LEN: usize = 12;

ioctl_iow_nr!(TUNSETIFF, b'T' as u32, 202, libc::c_int);
ioctl_iow_nr!(TUNSETOFFLOAD, b'T' as u32, 208, libc::c_uint);
ioctl_ior_nr!(TUNGETIFF, b'T' as u32, 210, libc::c_uint);
ioctl_iow_nr!(TUNSETVNETHDRSZ, b'T' as u32, 216, libc::c_int);

/// A tap interface that cannot be used.
#[derive(Debug, Error)]
pub enum TapError {
    /// Not an interface name.
    #[error("{0:?}: an interface's name has 1 to 15 bytes, without slashes or white space")]
    Name(String),
    /// The host has no tun driver.
    #[error("{name}: cannot open /dev/net/tun; load it with `modprobe tun`")]
    NoTun {
        /// The interface.
        name: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The user may not use the interface, or it does not exist and the user may not create it.
    #[error(
        "{0}: no permission on it, or it does not exist; make it with \
         `ip tuntap add dev {0} mode tap user $USER vnet_hdr` as root"
    )]
    Permission(String),
    /// Another process has it open.
    #[error("{0}: in use by another process; give each guest an interface of its own")]
    Busy(String),
    /// An interface of another kind.
    #[error("{0}: that interface is not a tap; give the name of one")]
    NotATap(String),
    /// The descriptor is not a tap interface, or its flags do not suit a guest.
    #[error("{0}: not a tap with IFF_NO_PI and IFF_VNET_HDR; open /dev/net/tun and attach it so")]
    NotATapDescriptor(String),
    /// The kernel refused another step.
    #[error("{name}: cannot {action}")]
    Host {
        /// The interface.
        name: String,
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Work on received frames that the guest's driver can take over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// It accepts frames without checksums.
    pub checksum: bool,
    /// It accepts unsegmented TCP over IPv4.
    pub tso4: bool,
    /// It accepts unsegmented TCP over IPv6.
    pub tso6: bool,
    /// It accepts them with explicit congestion notification.
    pub ecn: bool,
}

/// An open tap interface in non-blocking mode.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Attaches to the interface of the given name. If it does not exist and the caller may create it, it lives as long
    /// as the result.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let valid = (1..libc::IFNAMSIZ).contains(&name.len())
            && name
                .bytes()
                .all(|b| b.is_ascii_graphic() && b != b'/' && b != b'%');
        if !valid {
            return Err(TapError::Name(name.into()));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(|source| TapError::NoTun {
                name: name.into(),
                source,
            })?;
        // SAFETY: all-zero bytes are a valid `ifreq`: it holds integers and arrays of them.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`.
        check(unsafe { ioctl_with_mut_ref(&file, TUNSETIFF(), &mut request) }).map_err(
            |source| match (source.kind(), source.raw_os_error()) {
                (ErrorKind::PermissionDenied, _) => TapError::Permission(name.into()),
                (ErrorKind::ResourceBusy, _) => TapError::Busy(name.into()),
                (ErrorKind::InvalidInput, _) => TapError::NotATap(name.into()),
                _ => TapError::Host {
                    name: name.into(),
                    action: "attach to it",
                    source,
                },
            },
        )?;
        Self::attached(file, name)
    }

    /// Uses a descriptor that is attached to a tap interface; `name` identifies it in messages.
    pub fn from_fd(fd: OwnedFd, name: &str) -> Result<Self, TapError> {
        let file = File::from(fd);
        // SAFETY: all-zero bytes are a valid `ifreq`: it holds integers and arrays of them.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let bad = || TapError::NotATapDescriptor(name.into());
        // SAFETY: TUNGETIFF writes one `ifreq`.
        check(unsafe { ioctl_with_mut_ref(&file, TUNGETIFF(), &mut request) })
            .map_err(|_| bad())?;
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        // SAFETY: TUNGETIFF filled this member.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & (wanted | libc::IFF_TUN) != wanted {
            return Err(bad());
        }
        rustix::io::ioctl_fionbio(&file, true).map_err(|source| TapError::Host {
            name: name.into(),
            action: "make it not block",
            source: source.into(),
        })?;
        Self::attached(file, name)
    }

    fn attached(file: File, name: &str) -> Result<Self, TapError> {
        let length = HEADER_LEN as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        check(unsafe { ioctl_with_ref(&file, TUNSETVNETHDRSZ(), &length) }).map_err(|source| {
            TapError::Host {
                name: name.into(),
                action: "set its header length",
                source,
            }
        })?;
        Ok(Self { file })
    }

    /// Tells the kernel which offloads the guest accepts.
    pub fn set_offload(&self, offload: Offload) -> io::Result<()> {
        let bit = |set: bool, flag: libc::c_uint| if set { flag } else { 0 };
        // The kernel refuses segmentation without checksums.
        let segmentation = bit(offload.tso4, libc::TUN_F_TSO4)
            | bit(offload.tso6, libc::TUN_F_TSO6)
            | bit(offload.ecn, libc::TUN_F_TSO_ECN);
        let flags = if offload.checksum {
            libc::TUN_F_CSUM | segmentation
        } else {
            0
        };
        // SAFETY: TUNSETOFFLOAD takes a plain value.
        check(unsafe { ioctl_with_val(&self.file, TUNSETOFFLOAD(), flags.into()) })
    }

    /// The descriptor. Frames are read and written whole, with a header of [`HEADER_LEN`] bytes.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.file.as_raw_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_that_is_no_tap_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(
            Tap::from_fd(file.into(), "fd:0"),
            Err(TapError::NotATapDescriptor(_))
        ));
    }

    #[test]
    fn names_that_are_none_are_refused_before_the_kernel_sees_them() {
        for name in ["", "a/b", "a b", "tap%d", "sixteen-bytes-xx"] {
            assert!(matches!(Tap::open(name), Err(TapError::Name(_))), "{name}");
        }
    }
}
