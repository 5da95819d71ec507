//! The legacy interface of VFIO: a container that translates for groups of devices.

use std::{
    ffi::CString,
    fs::File,
    io,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use vfio_bindings::bindings::vfio::{VFIO_GROUP_FLAGS_CONTAINER_SET, VFIO_GROUP_FLAGS_VIABLE};

use super::{
    error::{VfioError, node_error},
    sysfs::{HostFunction, PciAddress, others_in_group},
};
use crate::{sync::Mutex, sys::vfio_container as calls};

/// Device node of the container.
const CONTAINER: &str = "/dev/vfio/vfio";

/// A container.
#[derive(Debug)]
pub struct Container {
    file: File,
    /// The open groups: two devices of one group share it.
    groups: Mutex<Vec<Weak<Group>>>,
}

/// A group in a container. Dropping removes it from the container.
#[derive(Debug)]
pub struct Group {
    number: u32,
    file: File,
}

impl Container {
    /// Uses `node`, or opens the device node.
    pub(super) fn open(node: Option<File>) -> Result<Self, VfioError> {
        let given = node.is_some();
        let file = match node {
            Some(node) => node,
            None => read_and_write(CONTAINER.as_ref())
                .map_err(|source| node_error(CONTAINER, source))?,
        };
        match calls::is_container(&file) {
            Ok(true) => {}
            Err(_) if given => return Err(VfioError::NotAContainer),
            Ok(false) => {
                return Err(VfioError::NoNode {
                    path: CONTAINER.into(),
                    hint: "VFIO's container cannot translate here: load it with `modprobe vfio_iommu_type1`",
                });
            }
            Err(source) => {
                return Err(VfioError::Host {
                    action: "use VFIO's container",
                    source,
                });
            }
        }
        Ok(Self {
            file,
            groups: Mutex::default(),
        })
    }

    /// The addresses that it can map, with the groups that it has now.
    pub(super) fn iova_ranges(&self) -> io::Result<Vec<RangeInclusive<u64>>> {
        calls::iova_ranges(&self.file)
    }

    /// Opens a device with its group, whose node may be open already.
    pub(super) fn device(
        &self,
        function: &HostFunction,
        node: Option<File>,
    ) -> Result<(File, Arc<Group>), VfioError> {
        let address = function.address;
        let number = function.group().ok_or(VfioError::NoIommu(address))?;
        let given = node.is_some();
        let mut groups = self.groups.lock();
        groups.retain(|group| group.strong_count() > 0);
        let open = groups.iter().filter_map(Weak::upgrade);
        let group = match open.into_iter().find(|group| group.number == number) {
            Some(group) => group,
            None => {
                let group = Arc::new(self.group(function, number, node)?);
                groups.push(Arc::downgrade(&group));
                group
            }
        };
        let name = CString::new(address.to_string()).map_err(|source| VfioError::Host {
            action: "name a device",
            source: source.into(),
        })?;
        let device =
            calls::device_of(&group.file, &name).map_err(|source| match source.raw_os_error() {
                Some(libc::ENODEV) if given => VfioError::NotInGroup(address),
                Some(libc::EBUSY) => VfioError::Busy(address),
                Some(libc::EPERM) => VfioError::UnsafeInterrupts,
                _ => failure(address, "open it in its group", source),
            })?;
        Ok((device, group))
    }

    /// A group that is in this container.
    fn group(
        &self,
        function: &HostFunction,
        number: u32,
        node: Option<File>,
    ) -> Result<Group, VfioError> {
        let address = function.address;
        let given = node.is_some();
        let file = match node {
            Some(node) => node,
            None => open_group(address, number)?,
        };
        let flags = calls::group_flags(&file).map_err(|source| match given {
            true => VfioError::NotAGroup(address),
            false => failure(address, "ask for its group", source),
        })?;
        if flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(VfioError::NotViable {
                address,
                group: number,
                others: others_in_group(function),
            });
        }
        if flags & VFIO_GROUP_FLAGS_CONTAINER_SET != 0 {
            return Err(VfioError::GroupInContainer(address));
        }
        calls::set_container(&file, &self.file)
            .map_err(|source| failure(address, "put its group into VFIO's container", source))?;
        let group = Group { number, file };
        // If the container lists ranges, an earlier group or the caller has enabled translation.
        if calls::iova_ranges(&self.file).is_err() {
            calls::set_iommu(&self.file).map_err(|source| match source.raw_os_error() {
                Some(libc::EPERM) => VfioError::UnsafeInterrupts,
                _ => failure(address, "have VFIO's container translate for it", source),
            })?;
        }
        Ok(group)
    }

    /// Maps memory for the devices.
    ///
    /// # Safety
    /// Devices write there until it is unmapped: no references into it may exist.
    pub(super) unsafe fn map(&self, iova: u64, len: u64, host: *mut u8) -> io::Result<()> {
        // SAFETY: the caller's promise.
        unsafe { calls::map(&self.file, iova, len, host) }
    }

    /// Unmaps it.
    pub(super) fn unmap(&self, iova: u64, len: u64) -> io::Result<()> {
        let unmapped = calls::unmap(&self.file, iova, len)?;
        if unmapped == len {
            Ok(())
        } else {
            Err(io::Error::other(format!("{unmapped} of {len} bytes were")))
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // If another process has the group open, it would keep it in the container. If its device is still open
        // elsewhere, the group leaves when that closes.
        if let Err(error) = calls::unset_container(&self.file) {
            tracing::debug!(%error, group = self.number, "a group stays in its container for now");
        }
    }
}

fn failure(address: PciAddress, action: &'static str, source: io::Error) -> VfioError {
    VfioError::Device {
        address,
        action,
        source,
    }
}

fn open_group(address: PciAddress, number: u32) -> Result<File, VfioError> {
    let path = PathBuf::from(format!("/dev/vfio/{number}"));
    read_and_write(&path).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => VfioError::Permission(path),
        io::ErrorKind::NotFound => VfioError::NoNode {
            path,
            hint: "the system's device manager has not made it; check /dev is mounted here",
        },
        io::ErrorKind::ResourceBusy => VfioError::Busy(address),
        _ => failure(address, "open its group", source),
    })
}

fn read_and_write(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_container_is_none() {
        let file = tempfile::tempfile().unwrap();
        let error = Container::open(Some(file)).unwrap_err();
        assert!(error.to_string().contains(CONTAINER), "{error}");
    }
}
