//! Peer-to-peer DMA: each directly mapped part of a BAR is mapped for DMA while it is decoded, at its
//! guest-physical address.
//!
//! iommufd maps a dma-buf of the part, the container its host mapping. If the host can do neither, devices cannot
//! reach each other; all else works.

use std::{
    ops::Range,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{
    host_device::HostDevice,
    iommu::{DmaMapping, Iommu},
    regions::RegionMapping,
};
use crate::{
    dmabuf::vfio_export::{self, Access},
    sync::Mutex,
    sys::vfio::BarRange,
};

/// A part of a BAR that can be mapped for DMA.
#[derive(Debug)]
struct Chunk {
    range: Range<u64>,
    /// What iommufd maps.
    dmabuf: Option<OwnedFd>,
}

/// The parts of one BAR.
#[derive(Debug)]
pub struct PeerMemory {
    device: Arc<HostDevice>,
    bar: u32,
    chunks: Vec<Chunk>,
    mapping: Arc<RegionMapping>,
    mapped: Mutex<Vec<DmaMapping>>,
    /// Whether a failure was logged: it will be the same each time.
    told: AtomicBool,
}

impl PeerMemory {
    /// Prepares `parts` of a BAR, which are mapped in `mapping`.
    pub fn new(
        device: Arc<HostDevice>,
        bar: u32,
        parts: &[Range<u64>],
        mapping: Arc<RegionMapping>,
    ) -> Self {
        let mut memory = Self {
            device,
            bar,
            chunks: Vec::new(),
            mapping,
            mapped: Mutex::default(),
            told: AtomicBool::new(false),
        };
        for range in parts {
            let dmabuf = match &*memory.device.iommu {
                Iommu::Container(_) => None,
                // One range a dma-buf: iommufd takes no more.
                Iommu::Iommufd(_) => match memory.export(range) {
                    Some(dmabuf) => Some(dmabuf),
                    None => continue,
                },
            };
            memory.chunks.push(Chunk {
                range: range.clone(),
                dmabuf,
            });
        }
        memory
    }

    fn export(&self, range: &Range<u64>) -> Option<OwnedFd> {
        let range = BarRange {
            offset: range.start,
            len: range.end - range.start,
        };
        match vfio_export::export(&*self.device, self.bar, &[range], Access::ReadWrite) {
            Ok(dmabuf) => Some(dmabuf),
            Err(error) => {
                self.tell(&error);
                None
            }
        }
    }

    /// Logs once that other devices cannot reach this one.
    fn tell(&self, error: &dyn std::error::Error) {
        if !self.told.swap(true, Ordering::Relaxed) {
            tracing::info!(
                error = %crate::error_line(error),
                device = %self.device.address,
                bar = self.bar,
                "other devices cannot reach this BAR"
            );
        }
    }

    /// The BAR is decoded at `address` from now on, or no longer.
    pub fn moved(&self, address: Option<u64>) {
        let mut mapped = self.mapped.lock();
        mapped.clear();
        let Some(address) = address else { return };
        for chunk in &self.chunks {
            let iova = address + chunk.range.start;
            let len = chunk.range.end - chunk.range.start;
            let iommu = &self.device.iommu;
            let result = match &chunk.dmabuf {
                Some(dmabuf) => iommu.map_file(iova, dmabuf, 0, len),
                // SAFETY: this process does not access a region's mapping.
                None => unsafe {
                    iommu.map_address(iova, self.mapping.host(chunk.range.start), len)
                },
            };
            match result {
                Ok(mapping) => mapped.push(mapping),
                Err(error) => self.tell(&error),
            }
        }
    }
}
