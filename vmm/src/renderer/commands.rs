//! Requests of the device, executed by the library.

use std::collections::BTreeMap;

use fanlight_devices::virtio::gpu::{
    protocol::*,
    render::wire::{
        FAILED, FAILED_NO_FILES, FencePosition, REPLY_DONE, REQUEST_EXPORT, REQUEST_EXPORT_TEXTURE,
        REQUEST_FENCE, REQUEST_READ_BACK, RamRange, ReadBack, Reply, Request,
    },
};
use libc::iovec;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{
    library::{Library, Refused},
    mapping::Mapping,
};

/// The library with the guest memory that it points to.
pub struct Renderer {
    library: Library,
    ram: Mapping,
    /// Guest memory of resources. The library keeps pointers to these lists.
    memory: BTreeMap<u32, Box<[iovec]>>,
}

/// The body of a request.
fn body<T: FromBytes + KnownLayout + Immutable>(request: &Request) -> Result<T, Refused> {
    T::read_from_bytes(&request.body).map_err(|_| Refused)
}

impl Renderer {
    /// Commands run on `library` with guest RAM at `ram`.
    pub fn new(library: Library, ram: Mapping) -> Self {
        Self {
            library,
            ram,
            memory: BTreeMap::new(),
        }
    }

    /// Executes a request, and requests its fence.
    pub fn serve(&mut self, request: Request) -> Reply {
        let mut reply = Reply::of(REPLY_DONE);
        let fence = request.head.fence;
        match self.execute(request, &mut reply) {
            Ok(()) if fence.number != 0 => {
                let made = if fence.of_ring != 0 {
                    let FencePosition { context, ring, .. } = fence;
                    self.library.ring_fence(context, ring, fence.number)
                } else {
                    self.library.fence(fence.number)
                };
                if made.is_ok() {
                    reply.head.fence = fence;
                }
            }
            Ok(()) => {}
            Err(Refused) if no_files() => reply.head.failed = FAILED_NO_FILES,
            Err(Refused) => reply.head.failed = FAILED,
        }
        reply
    }

    fn execute(&mut self, request: Request, reply: &mut Reply) -> Result<(), Refused> {
        let context = request.head.context;
        let library = &self.library;
        match request.head.what {
            REQUEST_FENCE => {}
            REQUEST_EXPORT => {
                let command: ResourceId = body(&request)?;
                let (file, info) = library.export(command.resource_id.get())?;
                reply.file = Some(file);
                reply.head.value = info;
            }
            REQUEST_EXPORT_TEXTURE => {
                let command: ResourceId = body(&request)?;
                if let Ok((file, layout)) = library.export_texture(command.resource_id.get()) {
                    reply.file = Some(file);
                    reply.data = layout.as_bytes().into();
                }
            }
            REQUEST_READ_BACK => return self.read_back(&request),
            VIRTIO_GPU_CMD_GET_CAPSET => {
                let command: GetCapset = body(&request)?;
                let (id, version) = (command.capset_id.get(), command.capset_version.get());
                reply.data = library.capset(id, version);
            }
            VIRTIO_GPU_CMD_CTX_CREATE => return library.create_context(context, &body(&request)?),
            VIRTIO_GPU_CMD_CTX_DESTROY => library.destroy_context(context),
            VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE => {
                let command: ResourceId = body(&request)?;
                library.attach_to_context(context, command.resource_id.get());
            }
            VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE => {
                let command: ResourceId = body(&request)?;
                library.detach_from_context(context, command.resource_id.get());
            }
            VIRTIO_GPU_CMD_SUBMIT_3D => return self.submit(&request),
            VIRTIO_GPU_CMD_RESOURCE_CREATE_3D => return library.create_3d(&body(&request)?),
            VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB => {
                let command: ResourceCreateBlob = body(&request)?;
                library.create_blob(context, &command)?;
                // A blob that cannot be mapped may be of use otherwise.
                let mappable = command.blob_flags.get() & VIRTIO_GPU_BLOB_FLAG_USE_MAPPABLE != 0;
                if mappable && let Ok((file, cache)) = library.export(command.resource_id.get()) {
                    reply.file = Some(file);
                    reply.head.value = cache;
                }
            }
            VIRTIO_GPU_CMD_TRANSFER_TO_HOST_3D => {
                return library.transfer(context, &body(&request)?, true);
            }
            VIRTIO_GPU_CMD_TRANSFER_FROM_HOST_3D => {
                return library.transfer(context, &body(&request)?, false);
            }
            VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING => {
                let command: ResourceAttachBacking = body(&request)?;
                return self.attach(command.resource_id.get(), &request.ranges);
            }
            VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING => {
                let command: ResourceId = body(&request)?;
                self.detach(command.resource_id.get());
            }
            VIRTIO_GPU_CMD_RESOURCE_UNREF => {
                let command: ResourceId = body(&request)?;
                self.detach(command.resource_id.get());
                self.library.unref(command.resource_id.get());
            }
            _ => return Err(Refused),
        }
        Ok(())
    }

    /// Runs a copy of a command stream: the library reads it more than once, and the guest can change the original.
    fn submit(&self, request: &Request) -> Result<(), Refused> {
        let command: CmdSubmit = body(request)?;
        let size = command.size.get();
        let mut stream = vec![0_u64; (size as usize).div_ceil(8)];
        let mut rest = stream.as_mut_bytes();
        for range in &request.ranges {
            let copied = self.ram.copy(range, rest)?;
            rest = rest.get_mut(copied..).ok_or(Refused)?;
        }
        self.library
            .submit(request.head.context, &mut stream, size / 4)
    }

    /// Attaches guest memory to a resource.
    fn attach(&mut self, resource: u32, ranges: &[RamRange]) -> Result<(), Refused> {
        if self.memory.contains_key(&resource) {
            return Err(Refused);
        }
        let parts = ranges.iter().map(|range| self.ram.part(range));
        let mut parts = parts.collect::<Result<Box<[iovec]>, Refused>>()?;
        // SAFETY: `self.memory` keeps the list until `detach`, and `self.ram` stays mapped.
        unsafe { self.library.attach_memory(resource, &mut parts) }?;
        self.memory.insert(resource, parts);
        Ok(())
    }

    /// Detaches the guest memory of a resource, if it has any.
    fn detach(&mut self, resource: u32) {
        if let Some(memory) = self.memory.remove(&resource) {
            self.library.detach_memory(resource);
            drop(memory);
        }
    }

    /// Copies pixels of a resource to the file of the request.
    fn read_back(&self, request: &Request) -> Result<(), Refused> {
        let command: ReadBack = body(request)?;
        let file = request.file.as_ref().ok_or(Refused)?;
        let pixels = Mapping::new(file).map_err(|_| Refused)?;
        let whole = RamRange {
            offset: 0,
            len: command.size,
        };
        let memory = pixels.part(&whole)?;
        let area = [command.x, command.y, command.width, command.height];
        // SAFETY: `pixels` is mapped until the end of this function, which alone uses it.
        unsafe {
            self.library.read_pixels(
                command.resource,
                area,
                command.stride,
                command.offset,
                memory,
            )
        }
    }
}

/// Whether the process cannot open another descriptor.
fn no_files() -> bool {
    let none = [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE];
    let copy = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3);
    copy.is_err_and(|error| none.contains(&error))
}
