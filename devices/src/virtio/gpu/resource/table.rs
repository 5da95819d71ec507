//! The table of resources, by id.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    blob::{Blob, BlobMemory, BlobRange},
    host::{HostKind, HostResource},
    image::{Image, ImageBacking},
    surface::{RESOURCE_COST, Surface},
};
use crate::{
    dmabuf::{MemoryEntry, Piece, ScatterList},
    memory::{AddressSpace, Charge, Quota, Segment},
    virtio::gpu::{error::CommandError, format::Format},
};
use fanlight_arch::layout::PAGE_SIZE;

/// The most 2D resources: each holds a descriptor.
const MAX_IMAGES: usize = 512;
/// Cost of a page of a blob in the host kernel while the blob is exported: udmabuf keeps a folio and an offset for
/// each. It is charged whether or not the blob is exported.
const PAGE_COST: u64 = 32;
/// Any kind.
#[derive(Debug)]
pub enum ResourceKind {
    /// RESOURCE_CREATE_2D.
    Image(Image),
    /// RESOURCE_CREATE_BLOB of guest memory.
    Blob(Blob),
    /// A resource of the renderer.
    Host(HostResource),
}

/// A resource.
#[derive(Debug)]
pub struct Resource {
    /// What it is made of.
    pub kind: ResourceKind,
    /// RESOURCE_ASSIGN_UUID gave it.
    pub uuid: Option<[u8; 16]>,
}

impl Resource {
    /// The memory with its pixels, if it has any now.
    pub fn surface(&self) -> Option<&Arc<Surface>> {
        match &self.kind {
            ResourceKind::Image(image) => Some(&image.surface),
            ResourceKind::Blob(blob) => blob.memory.surface(),
            ResourceKind::Host(host) => host.surface(),
        }
    }
}

/// All resources of a device.
#[derive(Debug)]
pub struct Resources {
    all: BTreeMap<u32, Resource>,
    images: usize,
    quota: Arc<Quota>,
}

impl Resources {
    /// None yet; `limit` bytes of host memory may be taken for them.
    pub fn new(limit: u64) -> Self {
        Self {
            all: BTreeMap::new(),
            images: 0,
            quota: Quota::new(limit),
        }
    }

    /// Host memory that resources hold, in bytes.
    pub fn memory_used(&self) -> u64 {
        self.quota.used()
    }

    /// The resource of this id.
    pub fn get(&self, id: u32) -> Result<&Resource, CommandError> {
        self.all.get(&id).ok_or(CommandError::Resource(id))
    }

    /// The resource of this id.
    pub fn get_mut(&mut self, id: u32) -> Result<&mut Resource, CommandError> {
        self.all.get_mut(&id).ok_or(CommandError::Resource(id))
    }

    /// All of them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut Resource)> {
        self.all.iter_mut().map(|(&id, resource)| (id, resource))
    }

    /// Forgets a resource.
    pub fn remove(&mut self, id: u32) -> Result<(), CommandError> {
        let resource = self.all.remove(&id).ok_or(CommandError::Resource(id))?;
        self.images -= usize::from(matches!(resource.kind, ResourceKind::Image(_)));
        Ok(())
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.all.clear();
        self.images = 0;
    }

    pub fn charge(&self, bytes: u64) -> Result<Charge, CommandError> {
        self.quota
            .charge(bytes)
            .ok_or(CommandError::OutOfMemory(bytes))
    }

    pub fn check_new(&self, id: u32) -> Result<(), CommandError> {
        if id == 0 || self.all.contains_key(&id) {
            return Err(CommandError::Resource(id));
        }
        Ok(())
    }

    pub fn insert(&mut self, id: u32, kind: ResourceKind) {
        self.all.insert(id, Resource { kind, uuid: None });
    }

    /// Enters a resource that the renderer has made.
    pub fn create_host(&mut self, id: u32, kind: HostKind) -> Result<(), CommandError> {
        self.check_new(id)?;
        let resource = HostResource {
            kind,
            mapped: None,
            backed: false,
            shown: None,
            no_export: false,
            pixels: None,
            _charge: self.charge(RESOURCE_COST)?,
        };
        self.insert(id, ResourceKind::Host(resource));
        Ok(())
    }

    /// The resource of this id, if it is the renderer's.
    pub fn host_mut(&mut self, id: u32) -> Result<&mut HostResource, CommandError> {
        match &mut self.get_mut(id)?.kind {
            ResourceKind::Host(resource) => Ok(resource),
            ResourceKind::Image(_) | ResourceKind::Blob(_) => Err(CommandError::Resource(id)),
        }
    }

    /// RESOURCE_CREATE_2D.
    pub fn create_2d(
        &mut self,
        id: u32,
        format: Format,
        width: u32,
        height: u32,
    ) -> Result<(), CommandError> {
        self.check_new(id)?;
        if self.images >= MAX_IMAGES {
            return Err(CommandError::OutOfMemory(0));
        }
        let image = Image::new(format, width, height, |bytes| self.charge(bytes))?;
        self.insert(id, ResourceKind::Image(image));
        self.images += 1;
        Ok(())
    }

    /// RESOURCE_CREATE_BLOB of guest memory. Without entries it has no memory until some is attached.
    pub fn create_blob(
        &mut self,
        id: u32,
        size: u64,
        entries: &[MemoryEntry],
        map: &AddressSpace,
    ) -> Result<(), CommandError> {
        self.check_new(id)?;
        if size == 0 {
            return Err(CommandError::Parameter("size of a blob"));
        }
        let charge = self.charge(RESOURCE_COST)?;
        let memory = if entries.is_empty() {
            BlobMemory::Detached
        } else {
            self.blob_memory(size, entries, map)?
        };
        self.insert(
            id,
            ResourceKind::Blob(Blob {
                size,
                memory,
                _charge: charge,
            }),
        );
        Ok(())
    }

    /// The first half of the path of a blob: entries → address space → backing → a buffer that can be exported.
    fn blob_memory(
        &self,
        size: u64,
        entries: &[MemoryEntry],
        map: &AddressSpace,
    ) -> Result<BlobMemory, CommandError> {
        let export = size.div_ceil(PAGE_SIZE).saturating_mul(PAGE_COST);
        let charge = self.charge(list_cost(entries).saturating_add(export))?;
        let memory = ScatterList::resolve(map, entries.iter().copied(), size)?;
        Ok(BlobMemory::new(memory, Arc::new(charge)))
    }

    /// RESOURCE_ATTACH_BACKING.
    pub fn attach(
        &mut self,
        id: u32,
        entries: &[MemoryEntry],
        map: &AddressSpace,
    ) -> Result<(), CommandError> {
        match &self.get(id)?.kind {
            ResourceKind::Image(image) if image.backing.is_none() => {
                let size = entries.iter().map(|entry| entry.len).sum();
                let backing = ImageBacking {
                    _charge: self.charge(list_cost(entries))?,
                    memory: ScatterList::resolve_ram(map, entries.iter().copied(), size)?,
                };
                if let ResourceKind::Image(image) = &mut self.get_mut(id)?.kind {
                    image.backing = Some(backing);
                }
            }
            ResourceKind::Blob(blob) if blob.memory.is_detached() => {
                let memory = self.blob_memory(blob.size, entries, map)?;
                if let ResourceKind::Blob(blob) = &mut self.get_mut(id)?.kind {
                    blob.memory = memory;
                }
            }
            ResourceKind::Image(_) | ResourceKind::Blob(_) | ResourceKind::Host(_) => {
                return Err(CommandError::Backing("is there already"));
            }
        }
        Ok(())
    }

    /// RESOURCE_DETACH_BACKING. Dma-bufs that were exported stay with their importers.
    pub fn detach(&mut self, id: u32) -> Result<(), CommandError> {
        let had = match &mut self.get_mut(id)?.kind {
            ResourceKind::Image(image) => image.backing.take().is_some(),
            ResourceKind::Blob(blob) => {
                !std::mem::replace(&mut blob.memory, BlobMemory::Detached).is_detached()
            }
            ResourceKind::Host(_) => false,
        };
        if had {
            Ok(())
        } else {
            Err(CommandError::Backing("is not there"))
        }
    }
}

impl Resources {
    /// Memory was mapped at `[gpa, gpa + len)` or removed: the blobs that this changes.
    pub fn memory_changed(&mut self, map: &AddressSpace, gpa: u64, len: u64) -> Vec<u32> {
        let changed = |(&id, resource): (&u32, &mut Resource)| match &mut resource.kind {
            ResourceKind::Blob(blob) => blob.memory.changed(map, gpa, len).then_some(id),
            ResourceKind::Image(_) | ResourceKind::Host(_) => None,
        };
        self.all.iter_mut().filter_map(changed).collect()
    }
}

fn list_cost(entries: &[MemoryEntry]) -> u64 {
    entries.len() as u64
        * (size_of::<Segment>() + size_of::<Piece>() + size_of::<BlobRange>()) as u64
}
