//! The host-visible region, in which the guest sees blobs of the renderer.
//!
//! One memory slot shows the whole [`Arena`], so that mapping a blob changes host page tables only. The
//! alternative, a slot for each blob, exists for comparison: KVM stops every vCPU for each slot.
//!
//! Passed-through devices reach shareable blobs, and nothing else of the region.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    sync::{Arc, MutexGuard},
};

use crate::{
    dma::{DmaMemory, SharedBlob, SharedBlobDmaMap},
    hypervisor::{Hypervisor, MappedSlot},
    memory::{Arena, ArenaError, Backing, BackingKind, IoHandler, SlotMapping},
    pci::{BarContent, BarHandler, BarMemory},
    sync::Mutex,
    sys::memfd,
    virtio::transport::SharedMemory,
};

/// `VIRTIO_GPU_SHM_ID_HOST_VISIBLE` (Virtio 1.4, 5.7.6.1).
const HOST_VISIBLE: u8 = 1;

/// Memory slots of blobs, if the region has none of its own.
#[derive(Debug, Default)]
struct Slots {
    /// By offset: length, and the slot while the region is decoded.
    blobs: BTreeMap<u64, (u64, Option<MappedSlot>)>,
}

#[derive(Debug)]
struct State {
    /// Where the guest has placed the region.
    address: Option<u64>,
    /// Blobs that passed-through devices reach, by offset. These and slots are dropped before the memory.
    shared: BTreeMap<u64, SharedBlob>,
    slots: Option<Slots>,
    arena: Arena,
}

/// The host-visible region of a GPU.
#[derive(Debug)]
pub struct HostMemory {
    state: Mutex<State>,
    hypervisor: Arc<dyn Hypervisor>,
    reach: Arc<SharedBlobDmaMap>,
    len: u64,
}

impl HostMemory {
    /// A region of `len` bytes, a power of two. `slot_per_blob` gives each blob a memory slot of its own.
    pub fn new(
        len: u64,
        slot_per_blob: bool,
        hypervisor: Arc<dyn Hypervisor>,
        reach: Arc<SharedBlobDmaMap>,
    ) -> Result<Arc<Self>, ArenaError> {
        let state = State {
            address: None,
            shared: BTreeMap::new(),
            slots: slot_per_blob.then(Slots::default),
            arena: Arena::new(len)?,
        };
        Ok(Arc::new(Self {
            state: Mutex::new(state),
            hypervisor,
            reach,
            len,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// The region as the transport shows it.
    pub fn shared_memory(self: &Arc<Self>) -> io::Result<SharedMemory> {
        let state = self.lock();
        let ranges = if state.slots.is_some() {
            Vec::new()
        } else {
            // The address space wants a file. The region consists of many, so it gets an empty one.
            let nothing = memfd::empty("fanlight-hostmem")?;
            let backing = Backing {
                kind: BackingKind::SharedMemory {
                    device: 0,
                    id: HOST_VISIBLE,
                },
                file: Arc::new(nothing),
                offset: 0,
            };
            vec![BarMemory {
                offset: 0,
                len: self.len,
                backing,
                host: state.arena.host_address(),
                readonly: false,
            }]
        };
        Ok(SharedMemory {
            id: HOST_VISIBLE,
            len: self.len,
            content: BarContent::Memory {
                handler: self.clone(),
                ranges,
                hypervisor: self.hypervisor.clone(),
            },
        })
    }

    /// Maps the first `len` bytes of `file` at `offset`. Passed-through devices reach it too if it is `shareable`.
    pub fn map(
        &self,
        offset: u64,
        len: u64,
        file: &File,
        shareable: bool,
    ) -> Result<(), ArenaError> {
        let State {
            address,
            shared,
            slots,
            arena,
        } = &mut *self.lock();
        arena
            .map(offset, len, file, true)
            .inspect_err(stop_if_lost)?;
        if let Some(slots) = slots {
            let slot = address.map(|address| {
                self.hypervisor.map_slot(SlotMapping {
                    gpa: address + offset,
                    len,
                    host: arena.host_address() + offset,
                    readonly: false,
                })
            });
            match slot.transpose() {
                Ok(slot) => slots.blobs.insert(offset, (len, slot)),
                Err(source) => {
                    arena.unmap(offset).inspect_err(stop_if_lost)?;
                    return Err(ArenaError::Host {
                        action: "give a blob a memory slot",
                        source,
                    });
                }
            };
        }
        if shareable {
            // SAFETY: the blob is removed from `shared` before it is unmapped, and only the guest accesses the
            // region.
            let source = unsafe { DmaMemory::new(file, arena.host_address() + offset) };
            let at = address.map(|address| address + offset);
            if let Some(blob) = self.reach.add(at, len, source) {
                shared.insert(offset, blob);
            }
        }
        Ok(())
    }

    /// Unmaps the blob at `offset`. Its DMA mapping is withdrawn first.
    pub fn unmap(&self, offset: u64) -> Result<(), ArenaError> {
        let State {
            shared,
            slots,
            arena,
            ..
        } = &mut *self.lock();
        shared.remove(&offset);
        if let Some(slots) = slots {
            slots.blobs.remove(&offset);
        }
        arena.unmap(offset).inspect_err(stop_if_lost)
    }

    /// Unmaps all blobs.
    pub fn clear(&self) {
        let State {
            shared,
            slots,
            arena,
            ..
        } = &mut *self.lock();
        shared.clear();
        if let Some(slots) = slots {
            slots.blobs.clear();
        }
        if let Err(error) = arena.clear() {
            stop_if_lost(&error);
        }
    }
}

/// A page that the guest reaches lost its reservation, which cannot be restored. The process ends at once, before
/// another mapping can come to lie there.
fn stop_if_lost(error: &ArenaError) {
    if matches!(error, ArenaError::Lost) {
        tracing::error!(%error, "the guest might come to see the host's memory: stopping at once");
        std::process::abort();
    }
}

impl IoHandler for HostMemory {
    /// Accesses where no blob has a slot.
    fn read(&self, _: u64, _: &mut [u8]) {}
    fn write(&self, _: u64, _: &[u8]) {}
}

impl BarHandler for HostMemory {
    fn mapped(&self, address: Option<u64>) {
        let state = &mut *self.lock();
        state.address = address;
        // All are withdrawn first: a region may move by less than its size.
        for blob in state.shared.values() {
            blob.moved(None);
        }
        if let Some(address) = address {
            for (offset, blob) in &state.shared {
                blob.moved(Some(address + offset));
            }
        }
        let State { arena, slots, .. } = state;
        let Some(slots) = slots else { return };
        for (&offset, (len, slot)) in &mut slots.blobs {
            *slot = None;
            if let Some(address) = address {
                let mapping = SlotMapping {
                    gpa: address + offset,
                    len: *len,
                    host: arena.host_address() + offset,
                    readonly: false,
                };
                match self.hypervisor.map_slot(mapping) {
                    Ok(mapped) => *slot = Some(mapped),
                    Err(error) => tracing::warn!(%error, "a GPU blob is not mapped for the guest"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::{dma::test_util::FakeSpace, hypervisor::test_util::FakeHypervisor};

    const PAGE: u64 = 4096;

    fn region(slot_per_blob: bool) -> (Arc<HostMemory>, Arc<FakeHypervisor>) {
        let hypervisor = Arc::new(FakeHypervisor::default());
        let reach = Arc::default();
        let memory = HostMemory::new(16 * PAGE, slot_per_blob, hypervisor.clone(), reach);
        (memory.unwrap(), hypervisor)
    }

    fn page() -> File {
        let mut file = memfd::empty("blob").unwrap();
        file.write_all(&[1; PAGE as usize]).unwrap();
        file
    }

    #[test]
    fn one_slot_shows_all() {
        let (memory, hypervisor) = region(false);
        let BarContent::Memory { ranges, .. } = memory.shared_memory().unwrap().content else {
            panic!("no memory");
        };
        assert_eq!((ranges[0].offset, ranges[0].len), (0, 16 * PAGE));
        memory.map(PAGE, PAGE, &page(), false).unwrap();
        memory.unmap(PAGE).unwrap();
        assert!(hypervisor.slots().is_empty());
    }

    #[test]
    fn slots_of_blobs_follow_the_region() {
        let (memory, hypervisor) = region(true);
        memory.map(0, PAGE, &page(), false).unwrap();
        assert!(hypervisor.slots().is_empty());
        memory.mapped(Some(0x10_0000));
        memory.map(2 * PAGE, PAGE, &page(), false).unwrap();
        assert_eq!(hypervisor.slots(), [(0x10_0000, PAGE), (0x10_2000, PAGE)]);
        memory.mapped(Some(0x20_0000));
        assert_eq!(hypervisor.slots(), [(0x20_0000, PAGE), (0x20_2000, PAGE)]);
        memory.unmap(0).unwrap();
        assert_eq!(hypervisor.slots(), [(0x20_2000, PAGE)]);
        memory.clear();
        assert!(hypervisor.slots().is_empty());
        assert!(memory.map(2 * PAGE, PAGE, &page(), false).is_ok());
    }

    #[test]
    fn devices_reach_what_is_shared_where_the_guest_sees_it() {
        for slots in [false, true] {
            let (memory, _) = region(slots);
            let space = Arc::new(FakeSpace::default());
            memory.reach.attach(space.clone());
            memory.map(0, PAGE, &page(), true).unwrap();
            memory.map(PAGE, PAGE, &page(), false).unwrap();
            assert_eq!(space.mapped(), []);
            memory.mapped(Some(0x10_0000));
            memory.map(2 * PAGE, PAGE, &page(), true).unwrap();
            assert_eq!(space.mapped(), [(0x10_0000, PAGE), (0x10_2000, PAGE)]);
            // Where the one was, the other one comes to lie.
            memory.mapped(Some(0x10_2000));
            assert_eq!(space.mapped(), [(0x10_2000, PAGE), (0x10_4000, PAGE)]);
            memory.mapped(None);
            assert_eq!(space.mapped(), []);
            memory.mapped(Some(0x20_0000));
            memory.unmap(0).unwrap();
            assert_eq!(space.mapped(), [(0x20_2000, PAGE)]);
            memory.clear();
            assert_eq!(space.mapped(), []);
        }
    }
}
