//! Why a device cannot be passed through, with what to do about it.

use std::{io, ops::RangeInclusive, path::PathBuf};

use thiserror::Error;

use super::sysfs::{PciAddress, VFIO_PCI};
use crate::{dmabuf::vfio_export::DmaBufError, pci::MsixError};

/// iommufd's device node.
pub(super) const IOMMUFD: &str = "/dev/iommu";

/// Why a device of the host cannot be passed through.
#[derive(Debug, Error)]
pub enum VfioError {
    /// There is no such device.
    #[error("{0}: the host has no such PCI device; `fanlight vfio list` shows those it has")]
    NoDevice(PciAddress),
    /// It is bound to another driver.
    #[error(
        "{address}: {}, not to {VFIO_PCI}; give it to user space with `fanlight vfio bind {address}` as root",
        match driver { Some(driver) => format!("bound to {driver}"), None => "bound to no driver".into() }
    )]
    NotBound {
        /// The device.
        address: PciAddress,
        /// Its driver, if it has one.
        driver: Option<String>,
    },
    /// The IOMMU is off.
    #[error(
        "{0}: the host isolates it by no IOMMU; switch VT-d or AMD-Vi on in the firmware, and on Intel \
         hosts boot with intel_iommu=on"
    )]
    NoIommu(PciAddress),
    /// Other devices of its group are in use by the host.
    #[error(
        "{address}: shares IOMMU group {group} with {others}, which the host uses; bind those to \
         {VFIO_PCI} or to no driver, or move the device to another slot"
    )]
    NotViable {
        /// The device.
        address: PciAddress,
        /// Its group.
        group: u32,
        /// The others, with their drivers.
        others: String,
    },
    /// Another process has it open.
    #[error("{0}: in use by another process; a device can be given to one guest at a time")]
    Busy(PciAddress),
    /// A device node may not be opened.
    #[error("no permission on {}: give yourself access with `chown $USER {}` as root", .0.display(), .0.display())]
    Permission(PathBuf),
    /// A device node is not there.
    #[error("no {}: {hint}", path.display())]
    NoNode {
        /// The node.
        path: PathBuf,
        /// What to do.
        hint: &'static str,
    },
    /// The descriptor is not a container.
    #[error("the descriptor is not a VFIO container; give the open /dev/vfio/vfio, or none")]
    NotAContainer,
    /// The descriptor is not a group.
    #[error("{0}: the group that was given is none; give its open node in /dev/vfio")]
    NotAGroup(PciAddress),
    /// The descriptor is the group of another device.
    #[error(
        "{0}: not in the group that was given; `fanlight vfio list` and the link iommu_group in its \
         directory in sysfs tell its group"
    )]
    NotInGroup(PciAddress),
    /// The group is in use already.
    #[error("{0}: its group is in a container already; hand it over as it was opened")]
    GroupInContainer(PciAddress),
    /// No interrupt remapping.
    #[error(
        "the host cannot isolate the device's interrupts: switch interrupt remapping on in the firmware, or \
         load vfio_iommu_type1 with allow_unsafe_interrupts=1 if you trust the guest"
    )]
    UnsafeInterrupts,
    /// The limit on locked memory.
    #[error(
        "cannot lock the guest's {} MiB of memory for DMA: the limit is {limit}; raise it with \
         `ulimit -l` or LimitMEMLOCK= to what the guest has and some more",
        size >> 20
    )]
    MemoryLock {
        /// What the guest has, in bytes.
        size: u64,
        /// The limit, for people.
        limit: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The IOMMU cannot map what the guest has.
    #[error(
        "the host's IOMMU cannot map {} MiB of the guest's memory at {:#x}; it maps {}; give the guest \
         less memory",
        (range.end() - range.start() + 1) >> 20,
        range.start(),
        ranges_for_people(allowed)
    )]
    OutOfReach {
        /// Guest-physical addresses that it cannot map.
        range: RangeInclusive<u64>,
        /// What it can.
        allowed: Vec<RangeInclusive<u64>>,
    },
    /// The description that the device gives of itself is invalid.
    #[error("{address}: {what}; the device is broken or asleep: reset it or the host")]
    Broken {
        /// The device.
        address: PciAddress,
        /// What is wrong.
        what: String,
    },
    /// Interrupts.
    #[error("cannot give a passed-through device its interrupts")]
    Msix(#[from] MsixError),
    /// A dma-buf.
    #[error(transparent)]
    DmaBuf(#[from] DmaBufError),
    /// vfio-ioctls failed.
    #[error("{address}: cannot {action}")]
    Library {
        /// The device.
        address: PciAddress,
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: vfio_ioctls::VfioError,
    },
    /// A system call on a device failed.
    #[error("{address}: cannot {action}")]
    Device {
        /// The device.
        address: PciAddress,
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A system call failed.
    #[error("cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Ranges as text.
fn ranges_for_people(ranges: &[RangeInclusive<u64>]) -> String {
    let texts: Vec<_> = ranges
        .iter()
        .map(|range| format!("{:#x}-{:#x}", range.start(), range.end()))
        .collect();
    texts.join(", ")
}

/// The error number behind an error of vfio-ioctls, where it kept one.
pub fn errno(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(number) = error.downcast_ref::<vmm_sys_util::errno::Error>() {
            return Some(number.errno());
        }
        if let Some(number) = error.downcast_ref::<io::Error>() {
            return number.raw_os_error();
        }
        cause = error.source();
    }
    None
}

/// The error for a VFIO device node that cannot be opened.
pub(super) fn node_error(path: &str, source: io::Error) -> VfioError {
    match source.kind() {
        io::ErrorKind::PermissionDenied => VfioError::Permission(path.into()),
        io::ErrorKind::NotFound if path == IOMMUFD => VfioError::NoNode {
            path: path.into(),
            hint: "this kernel has no iommufd; do not set it, or use a kernel built with CONFIG_IOMMUFD",
        },
        io::ErrorKind::NotFound => VfioError::NoNode {
            path: path.into(),
            hint: "load VFIO with `modprobe vfio-pci`",
        },
        _ => VfioError::Host {
            action: "open a VFIO device node",
            source,
        },
    }
}
