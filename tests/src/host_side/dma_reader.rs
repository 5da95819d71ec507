//! Proof on the host that a dma-buf has the expected content: a device reads it. The DMA engine of [`edu`] copies the
//! dma-buf, mapped by iommufd, into a file.

use std::{
    fs::File,
    os::{fd::AsRawFd, unix::fs::FileExt},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use fanlight_devices::{
    error_line,
    vfio::{HostDevice, Iommu, sysfs::HostFunction},
};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::{Context, Failure, Result, common::edu};

/// Bytes of one read.
pub const PAGE: u64 = 4096;
/// VFIO's index of configuration space, and COMMAND there with its memory and bus master bits.
const CONFIG: u32 = 7;
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: [u8; 2] = [0b110, 0];
/// IOVAs of the dma-buf and of the file.
const SOURCE: u64 = 0x1000_0000;
const SINK: u64 = 0x2000_0000;

/// Far longer than a transfer takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// An edu device of the host.
pub struct DmaReader {
    edu: Arc<HostDevice>,
    file: File,
}

impl DmaReader {
    /// Opens the device at `address`, which is bound to vfio-pci.
    pub fn open(address: &str) -> Result<Self> {
        let line = |error: &dyn std::error::Error| Failure(error_line(error));
        let address = address.parse().context("not a PCI address")?;
        let function = HostFunction::find(address).ok_or(Failure("no such device".into()))?;
        let iommu = Iommu::open(std::slice::from_ref(&function), Some(true), None);
        let iommu = iommu.map_err(|error| line(&error))?;
        let edu = HostDevice::open(&function, iommu, None).map_err(|error| line(&error))?;
        Self::new(Arc::new(edu))
    }

    /// Uses an open device.
    pub fn new(edu: Arc<HostDevice>) -> Result<Self> {
        edu.write(CONFIG, COMMAND, &MEMORY_AND_MASTER)
            .context("cannot write COMMAND")?;
        let file = memfd_create("sink", MemfdFlags::CLOEXEC).context("cannot make a file")?;
        let file = File::from(file);
        file.set_len(PAGE).context("cannot size a file")?;
        Ok(Self { edu, file })
    }

    /// Has the device read the page at `offset` of a dma-buf.
    pub fn page(&self, dmabuf: &impl AsRawFd, offset: u64) -> Result<Vec<u8>> {
        let iommu = &self.edu.iommu;
        let _source = iommu
            .map_file(SOURCE, dmabuf, offset, PAGE)
            .context("cannot map the dma-buf")?;
        let _sink = iommu
            .map_file(SINK, &self.file, 0, PAGE)
            .context("cannot map the file")?;
        self.transfer(SOURCE, edu::BUFFER, 1)?;
        self.transfer(edu::BUFFER, SINK, 3)?;
        let mut bytes = vec![0; PAGE as usize];
        self.file
            .read_exact_at(&mut bytes, 0)
            .context("cannot read the file")?;
        Ok(bytes)
    }

    /// Has the device read at an IOVA, mapped or not.
    pub fn reach_for(&self, iova: u64) -> Result<()> {
        self.transfer(iova, edu::BUFFER, 1)
    }

    fn transfer(&self, from: u64, to: u64, command: u64) -> Result<()> {
        for (register, value) in [
            (edu::DMA_SOURCE, from),
            (edu::DMA_DESTINATION, to),
            (edu::DMA_COUNT, PAGE),
            (edu::DMA_COMMAND, command),
        ] {
            self.edu
                .write(0, register as u64, &u64::to_le_bytes(value))
                .context("cannot write a register")?;
        }
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            let mut status = [0; 8];
            self.edu
                .read(0, edu::DMA_COMMAND as u64, &mut status)
                .context("cannot read a register")?;
            if status[0] & 1 == 0 {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Err(Failure("the DMA never ends".into()))
    }
}
