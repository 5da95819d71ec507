//! The I/O address space that translates and bounds DMA of devices: iommufd, or the VFIO container.
//!
//! A device sees memory at guest-physical addresses, so that drivers of the guest need no change.

use std::{fs::File, io, ops::RangeInclusive, os::fd::AsRawFd, path::Path, sync::Arc};

use iommufd_ioctls::{IommuFd, IommufdError};
use rustix::process::Resource;
use vfio_ioctls::VfioIommufd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::{
    container::Container,
    error::{IOMMUFD, VfioError, errno, node_error},
    sysfs::HostFunction,
};
use crate::{
    GuestMemory,
    dma::{DmaMemory, DmaSpace, MemoryKind},
    sys::iommufd,
};

/// The machine's I/O address space.
pub enum Iommu {
    /// An address space of iommufd.
    Iommufd(Arc<VfioIommufd>),
    /// A container.
    Container(Container),
}

impl std::fmt::Debug for Iommu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A host mapping of a file range, for DMA.
#[derive(Clone, Copy, Debug)]
pub struct MappedFile<'a> {
    /// The file.
    pub file: &'a File,
    /// Where in it.
    pub offset: u64,
    /// The same bytes as they are mapped here.
    pub host: *mut u8,
    /// Length in bytes.
    pub len: u64,
}

impl Iommu {
    /// Opens an empty address space for `devices`. If `iommufd` is `None`, it is used where the host has it for all
    /// of them. `node` is an open descriptor of iommufd or of the container, if there is one.
    pub fn open(
        devices: &[HostFunction],
        iommufd: Option<bool>,
        node: Option<File>,
    ) -> Result<Arc<Self>, VfioError> {
        let iommufd = iommufd.unwrap_or_else(|| {
            let has_node =
                |device: &HostFunction| device.character_device().is_some_and(|node| node.exists());
            (node.is_some() || Path::new(IOMMUFD).exists()) && devices.iter().all(has_node)
        });
        let iommu = if iommufd {
            Self::Iommufd(Arc::new(open_iommufd(node)?))
        } else {
            Self::Container(Container::open(node)?)
        };
        Ok(Arc::new(iommu))
    }

    /// What it is called.
    pub fn name(&self) -> &'static str {
        match self {
            Iommu::Iommufd(_) => "iommufd",
            Iommu::Container(_) => "container",
        }
    }

    /// The addresses that can be mapped for the devices that are attached now.
    pub fn allowed(&self) -> Result<Vec<RangeInclusive<u64>>, VfioError> {
        let ranges = match self {
            Iommu::Iommufd(space) => {
                iommufd::ioas_iova_ranges(&**space.iommufd(), space.ioas().id())
            }
            Iommu::Container(container) => container.iova_ranges(),
        };
        ranges.map_err(|source| VfioError::Host {
            action: "ask the IOMMU which addresses it maps",
            source,
        })
    }

    /// The number of bits of which every address can be mapped, except for reserved windows.
    pub fn address_bits(&self) -> Result<u8, VfioError> {
        let allowed = self.allowed()?;
        let highest = allowed.iter().map(|range| *range.end()).max();
        Ok(highest
            .and_then(|last| last.checked_add(1))
            .map_or(64, |end| end.ilog2() as u8))
    }

    /// Maps all of guest RAM at its guest-physical addresses.
    pub fn map_ram(self: &Arc<Self>, mem: &GuestMemory) -> Result<Vec<DmaMapping>, VfioError> {
        let allowed = self.allowed()?;
        let size = mem.iter().map(|region| region.len()).sum();
        let mut mappings = Vec::new();
        for region in mem.iter() {
            let (Some(file), Ok(host)) = (
                region.file_offset(),
                region.get_host_address(MemoryRegionAddress(0)),
            ) else {
                continue;
            };
            let gpa = region.start_addr().0;
            let range = gpa..=gpa + (region.len() - 1);
            if !covers(&allowed, &range) {
                return Err(VfioError::OutOfReach { range, allowed });
            }
            let source = MappedFile {
                file: file.file(),
                offset: file.start(),
                host,
                len: region.len(),
            };
            let mapping = self.map_memory(gpa, source).map_err(|source| {
                if source.raw_os_error() == Some(libc::ENOMEM) {
                    let limit = rustix::process::getrlimit(Resource::Memlock).current;
                    VfioError::MemoryLock {
                        size,
                        limit: limit.map_or("unlimited".into(), |l| format!("{} KiB", l >> 10)),
                        source,
                    }
                } else {
                    VfioError::Host {
                        action: "map guest memory for DMA",
                        source,
                    }
                }
            })?;
            mappings.push(mapping);
        }
        Ok(mappings)
    }

    /// Maps memory at `iova`, through its file where the kernel can: that needs no mapping in this process.
    fn map_memory(self: &Arc<Self>, iova: u64, source: MappedFile<'_>) -> io::Result<DmaMapping> {
        if let Iommu::Iommufd(_) = &**self {
            match self.map_file(iova, source.file, source.offset, source.len) {
                // Linux before 6.13 maps by address only.
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {}
                result => return result,
            }
        }
        // SAFETY: guest memory, which is only ever accessed by volatile accesses.
        unsafe { self.map_address(iova, source.host, source.len) }
    }

    /// Maps a range of a memory file, or of a dma-buf of a VFIO device, at `iova`. The container has no
    /// such call.
    pub fn map_file(
        self: &Arc<Self>,
        iova: u64,
        file: &impl AsRawFd,
        offset: u64,
        len: u64,
    ) -> io::Result<DmaMapping> {
        let Iommu::Iommufd(iommufd) = &**self else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        iommufd
            .ioas()
            .map_file(file.as_raw_fd(), offset, len, iova, true)
            .map_err(|error| system_error(&error))?;
        Ok(DmaMapping {
            iommu: self.clone(),
            iova,
            len,
        })
    }

    /// Maps what lies at `host` at `iova`: memory, or with a container a BAR's mapping too.
    ///
    /// # Safety
    /// Devices write there while the result lives: no references into it may exist.
    pub unsafe fn map_address(
        self: &Arc<Self>,
        iova: u64,
        host: *mut u8,
        len: u64,
    ) -> io::Result<DmaMapping> {
        let size = usize::try_from(len).map_err(io::Error::other)?;
        match &**self {
            // SAFETY: the caller's promise is the one that vfio-ioctls asks for.
            Iommu::Iommufd(iommufd) => unsafe { iommufd.vfio_dma_map(iova, size, host) }
                .map_err(|error| system_error(&error))?,
            // SAFETY: the caller's promise.
            Iommu::Container(container) => unsafe { container.map(iova, len, host) }?,
        }
        Ok(DmaMapping {
            iommu: self.clone(),
            iova,
            len,
        })
    }
}

impl DmaSpace for Iommu {
    fn map(
        self: Arc<Self>,
        iova: u64,
        len: u64,
        source: &DmaMemory,
    ) -> io::Result<Box<dyn std::fmt::Debug + Send>> {
        let mapping = match &source.0 {
            MemoryKind::File(host) => {
                let host = std::ptr::without_provenance_mut(*host as usize);
                // SAFETY: the promise of `DmaMemory::new`.
                unsafe { self.map_address(iova, host, len) }
            }
            MemoryKind::DmaBuf(file) => self.map_file(iova, file, 0, len),
        };
        Ok(Box::new(mapping?))
    }
}

/// A range that devices can reach. Dropping unmaps it.
#[derive(Debug)]
pub struct DmaMapping {
    iommu: Arc<Iommu>,
    iova: u64,
    len: u64,
}

impl Drop for DmaMapping {
    fn drop(&mut self) {
        let result = match &*self.iommu {
            Iommu::Iommufd(iommufd) => iommufd
                .vfio_dma_unmap(self.iova, self.len as usize)
                .map_err(|error| system_error(&error)),
            Iommu::Container(container) => container.unmap(self.iova, self.len),
        };
        if let Err(error) = result {
            let iova = format_args!("{:#x}", self.iova);
            tracing::error!(%error, iova, "cannot unmap memory from the IOMMU");
        }
    }
}

fn open_iommufd(node: Option<File>) -> Result<VfioIommufd, VfioError> {
    let iommufd = match node {
        Some(node) => IommuFd::new_from_fd(node),
        None => IommuFd::new().map_err(|error| match error {
            IommufdError::OpenIommufd(source) => node_error(IOMMUFD, source),
            error => VfioError::Host {
                action: "use iommufd",
                source: io::Error::other(error),
            },
        })?,
    };
    VfioIommufd::new(Arc::new(iommufd), None, None).map_err(|error| VfioError::Host {
        action: "make an address space of iommufd",
        source: system_error(&error),
    })
}

/// The system error behind an error of the libraries.
fn system_error(error: &(dyn std::error::Error + 'static)) -> io::Error {
    match errno(error) {
        Some(number) => io::Error::from_raw_os_error(number),
        None => io::Error::other(error.to_string()),
    }
}

/// Whether one of `ranges` holds all of `range`. An empty list is a kernel that does not tell.
pub fn covers(ranges: &[RangeInclusive<u64>], range: &RangeInclusive<u64>) -> bool {
    ranges.is_empty()
        || ranges
            .iter()
            .any(|allowed| allowed.contains(range.start()) && allowed.contains(range.end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_must_lie_in_one_that_is_allowed() {
        let allowed = [0..=0xfedf_ffff, 0xfef0_0000..=0xff_ffff_ffff];
        assert!(covers(&allowed, &(0..=0xbfff_ffff)));
        assert!(covers(&allowed, &(1 << 32..=0xff_ffff_ffff)));
        assert!(!covers(&allowed, &(0xfed0_0000..=0xfeef_ffff)));
        assert!(!covers(&allowed, &(0..=1 << 33)));
        assert!(!covers(&allowed, &(1 << 40..=1 << 41)));
        assert!(covers(&[], &(0..=1)));
    }

    #[test]
    fn the_systems_error_survives_the_libraries() {
        let number = vmm_sys_util::errno::Error::new(libc::ENOMEM);
        let error = vfio_ioctls::VfioError::IommuDmaMap(number);
        assert_eq!(system_error(&error).raw_os_error(), Some(libc::ENOMEM));
        let number = vmm_sys_util::errno::Error::new(libc::ENOTTY);
        let error = IommufdError::IommuIoasMapFile(number);
        assert_eq!(system_error(&error).raw_os_error(), Some(libc::ENOTTY));
    }
}
