//! DMA mappings of shareable blobs of the GPU, so that passed-through devices reach them.
//!
//! A blob is mapped at the guest-physical address at which the guest sees it, for as long as it lies there. The GPU
//! registers its blobs whether or not there are passed-through devices. Those come and go with the address space
//! that bounds them. If the host cannot map a blob, passed-through devices cannot reach it; all else works.

use std::{
    collections::BTreeMap,
    fmt, io,
    sync::{
        Arc, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use super::space::{DmaMemory, DmaSpace, MemoryKind};
use crate::{
    memory::{Charge, Quota},
    sync::Mutex,
};

/// Dma-bufs that are kept open, so that devices which come later reach them too. A guest can make more than this
/// process may have descriptors.
const MAX_DMABUFS: u64 = 256;

#[derive(Debug)]
struct Blob {
    address: Option<u64>,
    len: u64,
    source: DmaMemory,
    mapping: Option<Box<dyn fmt::Debug + Send>>,
    _descriptor: Option<Charge>,
}

#[derive(Debug, Default)]
struct State {
    space: Option<Arc<dyn DmaSpace>>,
    blobs: BTreeMap<u64, Blob>,
    /// Number of the last blob.
    number: u64,
}

/// All blobs that passed-through devices may reach, and their DMA mappings.
#[derive(Debug)]
pub struct SharedBlobDmaMap {
    state: Mutex<State>,
    dmabufs: Arc<Quota>,
    /// Whether a failure was logged: it will be the same for each blob.
    told: AtomicBool,
}

impl Default for SharedBlobDmaMap {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            dmabufs: Quota::new(MAX_DMABUFS),
            told: AtomicBool::new(false),
        }
    }
}

impl SharedBlobDmaMap {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Maps all blobs in `space`, which bounds the passed-through devices that there are from now on.
    pub fn attach(&self, space: Arc<dyn DmaSpace>) {
        let state = &mut *self.lock();
        state.space = Some(space.clone());
        for blob in state.blobs.values_mut() {
            self.map(blob, &space);
        }
    }

    /// Withdraws all mappings: the last passed-through device has gone.
    pub fn detach(&self) {
        let state = &mut *self.lock();
        for blob in state.blobs.values_mut() {
            blob.mapping = None;
        }
        state.space = None;
    }

    /// Lets devices reach a blob of `len` bytes. `address` is where the guest sees it, if it does now.
    pub fn add(
        self: &Arc<Self>,
        address: Option<u64>,
        len: u64,
        source: io::Result<DmaMemory>,
    ) -> Option<SharedBlob> {
        let source = source.inspect_err(|error| self.tell(error, None)).ok()?;
        let state = &mut *self.lock();
        let descriptor = match source.0 {
            MemoryKind::File(_) => None,
            MemoryKind::DmaBuf(_) => {
                let charge = self.dmabufs.charge(1);
                if charge.is_none() {
                    self.tell(&"as many dma-bufs are mapped as can be", Some(&source));
                    return None;
                }
                charge
            }
        };
        let mut blob = Blob {
            address,
            len,
            source,
            mapping: None,
            _descriptor: descriptor,
        };
        if let Some(space) = &state.space {
            self.map(&mut blob, space);
        }
        state.number += 1;
        state.blobs.insert(state.number, blob);
        Some(SharedBlob {
            reach: self.clone(),
            number: state.number,
        })
    }

    fn map(&self, blob: &mut Blob, space: &Arc<dyn DmaSpace>) {
        blob.mapping = None;
        let Some(address) = blob.address else { return };
        match space.clone().map(address, blob.len, &blob.source) {
            Ok(mapping) => blob.mapping = Some(mapping),
            Err(error) => self.tell(&error, Some(&blob.source)),
        }
    }

    /// Logs once that devices cannot reach a blob.
    fn tell(&self, error: &dyn fmt::Display, source: Option<&DmaMemory>) {
        if !self.told.swap(true, Ordering::Relaxed) {
            let hint = match source.map(|source| &source.0) {
                Some(MemoryKind::DmaBuf(_)) => {
                    "Linux maps no dma-bufs of graphics drivers for devices: have the guest's programs copy"
                }
                Some(MemoryKind::File(_)) => "check the limit of locked memory (ulimit -l)",
                None => "have the guest's programs copy",
            };
            tracing::info!(%error, hint, "passed-through devices cannot reach a blob of the GPU");
        }
    }
}

/// A blob that devices may reach. Dropping withdraws its DMA mapping, and returns when no device reaches it any
/// more.
#[derive(Debug)]
pub struct SharedBlob {
    reach: Arc<SharedBlobDmaMap>,
    number: u64,
}

impl SharedBlob {
    /// The guest sees the blob at `address` from now on, or nowhere: the old mapping is withdrawn first.
    pub fn moved(&self, address: Option<u64>) {
        let state = &mut *self.reach.lock();
        let Some(blob) = state.blobs.get_mut(&self.number) else {
            return;
        };
        blob.address = address;
        match &state.space {
            Some(space) => self.reach.map(blob, space),
            None => blob.mapping = None,
        }
    }
}

impl Drop for SharedBlob {
    fn drop(&mut self) {
        let state = &mut *self.reach.lock();
        state.blobs.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::dma::test_util::FakeSpace;

    fn memory() -> io::Result<DmaMemory> {
        let file = File::from(memfd_create("blob", MemfdFlags::CLOEXEC).unwrap());
        // SAFETY: nothing is mapped anywhere.
        unsafe { DmaMemory::new(&file, 0x1000) }
    }

    #[test]
    fn blobs_are_mapped_while_they_and_devices_are_there() {
        let reach = Arc::<SharedBlobDmaMap>::default();
        let early = reach.add(Some(0x1_0000), 0x1000, memory()).unwrap();
        let nowhere = reach.add(None, 0x1000, memory()).unwrap();
        let space = Arc::new(FakeSpace::default());
        reach.attach(space.clone());
        assert_eq!(space.mapped(), [(0x1_0000, 0x1000)]);
        let late = reach.add(Some(0x2_0000), 0x2000, memory()).unwrap();
        assert_eq!(space.mapped(), [(0x1_0000, 0x1000), (0x2_0000, 0x2000)]);
        early.moved(None);
        nowhere.moved(Some(0x3_0000));
        assert_eq!(space.mapped(), [(0x2_0000, 0x2000), (0x3_0000, 0x1000)]);
        drop(late);
        assert_eq!(space.mapped(), [(0x3_0000, 0x1000)]);
        reach.detach();
        assert_eq!(space.mapped(), []);
        nowhere.moved(Some(0x4_0000));
        reach.attach(space.clone());
        assert_eq!(space.mapped(), [(0x4_0000, 0x1000)]);
        drop((early, nowhere));
        assert_eq!(space.mapped(), []);
    }

    #[test]
    fn what_cannot_be_mapped_harms_nothing() {
        let reach = Arc::<SharedBlobDmaMap>::default();
        reach.attach(Arc::new(FakeSpace {
            refuses: true,
            ..Default::default()
        }));
        let blob = reach.add(Some(0x1000), 0x1000, memory()).unwrap();
        assert!(reach.told.load(Ordering::Relaxed));
        blob.moved(Some(0x2000));
        // SAFETY: nothing is mapped anywhere.
        let device = unsafe { DmaMemory::new(&File::open("/proc/version").unwrap(), 0) };
        assert!(reach.add(Some(0x9000), 0x1000, device).is_none());
    }
}
