//! What the driver has the device remember: 2D resources, whose pixels lie in memory of the device's, and
//! blobs, whose pixels stay where the driver drew them.

use std::{collections::BTreeMap, fs::File, io, sync::Arc};

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{FileOffset, MmapRegion};

use super::{
    super::{
        budget::{Budget, Charge},
        commands::CommandError,
        format::Format,
        output::Mode,
    },
    blob::{BlobMemory, Place},
    host::HostResource,
};
use crate::{
    dmabuf::{Buffer, MemoryEntry, Piece, ScatterList},
    memory::{AddressSpace, BackingKind, Segment},
};
use fanlight_arch::layout::PAGE_SIZE;

/// The longest list of entries: 1 GiB of single pages, which is more than any image.
pub const MAX_ENTRIES: u32 = 1 << 18;
/// The most 2D resources: each holds a descriptor.
const MAX_IMAGES: usize = 512;
/// What a resource costs besides its pixels and entries.
pub const RESOURCE_COST: u64 = 1 << 10;
/// What a page of a blob costs in the host's kernel while the blob is exported (udmabuf keeps a folio and an
/// offset for each), whether or not it is.
const PAGE_COST: u64 = 32;
/// Rows of 2D resources start at multiples of this: what the strictest GPUs import.
pub const ROW_ALIGNMENT: u32 = 256;

/// Memory with pixels, on the account of the guest that has it.
#[derive(Debug)]
pub struct Surface {
    /// The memory.
    pub buffer: Buffer,
    _charge: Arc<Charge>,
}

/// A 2D resource.
#[derive(Debug)]
pub struct Image {
    /// Format of its pixels.
    pub format: Format,
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Bytes from one row to the next.
    pub stride: u32,
    /// The pixels.
    pub surface: Arc<Surface>,
    /// The same, mapped.
    pub pixels: MmapRegion,
    /// Where transfers read from.
    pub backing: Option<ImageBacking>,
}

/// Guest memory behind a 2D resource.
#[derive(Debug)]
pub struct ImageBacking {
    /// The memory.
    pub memory: ScatterList,
    _charge: Charge,
}

/// A resource of guest memory.
#[derive(Debug)]
pub struct Blob {
    /// Bytes.
    pub size: u64,
    /// The memory.
    pub memory: BlobMemory,
    _charge: Charge,
}

/// Any kind.
#[derive(Debug)]
pub enum Kind {
    /// RESOURCE_CREATE_2D.
    Image(Image),
    /// RESOURCE_CREATE_BLOB of guest memory.
    Blob(Blob),
    /// What the renderer has.
    Host(HostResource),
}

/// A resource.
#[derive(Debug)]
pub struct Resource {
    /// What it is made of.
    pub kind: Kind,
    /// RESOURCE_ASSIGN_UUID gave it.
    pub uuid: Option<[u8; 16]>,
}

impl Resource {
    /// The memory with its pixels, if it has any now.
    pub fn surface(&self) -> Option<&Arc<Surface>> {
        match &self.kind {
            Kind::Image(image) => Some(&image.surface),
            Kind::Blob(blob) => blob.memory.surface(),
            Kind::Host(host) => host.surface(),
        }
    }
}

/// All resources of a device.
#[derive(Debug)]
pub struct Resources {
    all: BTreeMap<u32, Resource>,
    images: usize,
    budget: Budget,
}

impl Surface {
    /// Pieces of memory on an account.
    pub(super) fn new(pieces: Vec<Piece>, charge: Arc<Charge>) -> Arc<Self> {
        Arc::new(Self {
            buffer: Buffer::new(pieces),
            _charge: charge,
        })
    }
}

impl Resources {
    /// None yet; `limit` bytes of host memory may be taken for them.
    pub fn new(limit: u64) -> Self {
        Self {
            all: BTreeMap::new(),
            images: 0,
            budget: Budget::new(limit),
        }
    }

    /// Host memory that resources hold, in bytes.
    pub fn memory_used(&self) -> u64 {
        self.budget.used()
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
        self.images -= usize::from(matches!(resource.kind, Kind::Image(_)));
        Ok(())
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.all.clear();
        self.images = 0;
    }

    pub fn charge(&self, bytes: u64) -> Result<Charge, CommandError> {
        self.budget
            .charge(bytes)
            .ok_or(CommandError::OutOfMemory(bytes))
    }

    pub fn check_new(&self, id: u32) -> Result<(), CommandError> {
        if id == 0 || self.all.contains_key(&id) {
            return Err(CommandError::Resource(id));
        }
        Ok(())
    }

    pub fn insert(&mut self, id: u32, kind: Kind) {
        self.all.insert(id, Resource { kind, uuid: None });
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
        let fits = 1..=Mode::MAX;
        if !fits.contains(&width) || !fits.contains(&height) {
            return Err(CommandError::Parameter("size of a 2D resource"));
        }
        if self.images >= MAX_IMAGES {
            return Err(CommandError::OutOfMemory(0));
        }
        let stride = (width * Format::BYTES).next_multiple_of(ROW_ALIGNMENT);
        let size = (u64::from(stride) * u64::from(height)).next_multiple_of(PAGE_SIZE);
        let charge = self.charge(size + RESOURCE_COST)?;
        let (file, pixels) = host_memory(size).map_err(CommandError::Host)?;
        let piece = Piece {
            kind: BackingKind::Ram,
            file,
            offset: 0,
            len: size,
        };
        self.insert(
            id,
            Kind::Image(Image {
                format,
                width,
                height,
                stride,
                surface: Surface::new(vec![piece], Arc::new(charge)),
                pixels,
                backing: None,
            }),
        );
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
            Kind::Blob(Blob {
                size,
                memory,
                _charge: charge,
            }),
        );
        Ok(())
    }

    /// A blob's road, its first half: entries → map → backing → a buffer that can be exported.
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
            Kind::Image(image) if image.backing.is_none() => {
                let size = entries.iter().map(|entry| entry.len).sum();
                let backing = ImageBacking {
                    _charge: self.charge(list_cost(entries))?,
                    memory: ScatterList::resolve_ram(map, entries.iter().copied(), size)?,
                };
                if let Kind::Image(image) = &mut self.get_mut(id)?.kind {
                    image.backing = Some(backing);
                }
            }
            Kind::Blob(blob) if blob.memory.is_detached() => {
                let memory = self.blob_memory(blob.size, entries, map)?;
                if let Kind::Blob(blob) = &mut self.get_mut(id)?.kind {
                    blob.memory = memory;
                }
            }
            _ => return Err(CommandError::Backing("is there already")),
        }
        Ok(())
    }

    /// RESOURCE_DETACH_BACKING. What was exported of the memory stays with those who have it.
    pub fn detach(&mut self, id: u32) -> Result<(), CommandError> {
        let had = match &mut self.get_mut(id)?.kind {
            Kind::Image(image) => image.backing.take().is_some(),
            Kind::Blob(blob) => {
                !std::mem::replace(&mut blob.memory, BlobMemory::Detached).is_detached()
            }
            Kind::Host(_) => false,
        };
        if had {
            Ok(())
        } else {
            Err(CommandError::Backing("is not there"))
        }
    }
}

impl Resources {
    /// Memory has come to `[gpa, gpa + len)` or left it: the blobs that this changes.
    pub fn memory_changed(&mut self, map: &AddressSpace, gpa: u64, len: u64) -> Vec<u32> {
        let changed = |(&id, resource): (&u32, &mut Resource)| match &mut resource.kind {
            Kind::Blob(blob) => blob.memory.changed(map, gpa, len).then_some(id),
            Kind::Image(_) | Kind::Host(_) => None,
        };
        self.all.iter_mut().filter_map(changed).collect()
    }
}

fn list_cost(entries: &[MemoryEntry]) -> u64 {
    entries.len() as u64 * (size_of::<Segment>() + size_of::<Piece>() + size_of::<Place>()) as u64
}

/// A memfd with its mapping. Sealed as udmabuf wants it: against shrinking, not against writing.
pub fn host_memory(size: u64) -> io::Result<(Arc<File>, MmapRegion)> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memfd = rustix::fs::memfd_create("fanlight-gpu", flags)?;
    rustix::fs::ftruncate(&memfd, size)?;
    rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW)?;
    let file = Arc::new(File::from(memfd));
    let mapping = MmapRegion::from_file(FileOffset::from_arc(file.clone(), 0), size as usize)
        .map_err(io::Error::other)?;
    Ok((file, mapping))
}
