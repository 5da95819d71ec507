//! Commands for the renderer: checked by the device, carried out by the renderer.

use std::fs::File;

use super::{
    super::{
        error::CommandError,
        protocol::*,
        request::Input,
        resource::{HostKind, ResourceKind},
        response::Response,
        state::{SharedState, State},
    },
    blob_files::BlobFile,
    completion::{CommandContext, CommandOutcome, Completion, later},
    host_memory::HostMemory,
    outputs::{show_blob, show_texture},
    renderer::Renderer,
    wire::{REQUEST_EXPORT, RamRange, Reply, Request},
};
use crate::dmabuf::{MemoryEntry, ScatterList};
use fanlight_arch::layout::PAGE_SIZE;

/// Contexts at a time: the renderer may have a process for each.
const MAX_CONTEXTS: usize = 1 << 10;
/// The longest command stream. Those of Mesa have some hundred KiB.
const MAX_STREAM: u64 = 64 << 20;

impl Renderer {
    /// Executes a command of the control queue, by the renderer if it concerns it, else by
    /// `State::control`.
    pub fn command(
        &mut self,
        header: &CtrlHdr,
        input: &mut Input,
        context: &CommandContext,
    ) -> Result<CommandOutcome, CommandError> {
        let type_ = header.type_.get();
        let ctx_id = header.ctx_id.get();
        match type_ {
            VIRTIO_GPU_CMD_GET_CAPSET_INFO => self.capset_info(&input.take()?),
            VIRTIO_GPU_CMD_GET_CAPSET => self.capset(&input.take()?),
            VIRTIO_GPU_CMD_CTX_CREATE => self.create_context(ctx_id, input.take()?, context),
            VIRTIO_GPU_CMD_CTX_DESTROY => self.destroy_context(ctx_id),
            VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE | VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE => {
                self.attach_to_context(type_, ctx_id, input.take()?, context)
            }
            VIRTIO_GPU_CMD_SUBMIT_3D => self.submit(ctx_id, input, context),
            VIRTIO_GPU_CMD_RESOURCE_CREATE_3D => create_3d(input.take()?, context),
            VIRTIO_GPU_CMD_TRANSFER_TO_HOST_3D | VIRTIO_GPU_CMD_TRANSFER_FROM_HOST_3D => {
                let command: TransferHost3d = input.take()?;
                context
                    .state
                    .lock()
                    .resources
                    .host_mut(command.resource_id.get())?;
                later(Request::new(type_, ctx_id, &command), Completion::Ok)
            }
            VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB => self.create_blob(ctx_id, input, context),
            VIRTIO_GPU_CMD_RESOURCE_MAP_BLOB => self.map_blob(&input.take()?, context),
            VIRTIO_GPU_CMD_RESOURCE_UNMAP_BLOB => self.unmap_blob(input.take()?, context),
            VIRTIO_GPU_CMD_RESOURCE_UNREF => self.unref(input.take()?, context),
            VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING => attach(input, context),
            VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING => self.detach(input.take()?, context),
            VIRTIO_GPU_CMD_SET_SCANOUT => self.set_scanout(&input.take()?, context),
            VIRTIO_GPU_CMD_SET_SCANOUT_BLOB => self.set_scanout_blob(&input.take()?, context),
            VIRTIO_GPU_CMD_RESOURCE_FLUSH => self.flush(input.take()?, context),
            _ => {
                let mut state = context.state.lock();
                Ok(state.control(type_, input, context.map)?.into())
            }
        }
    }

    /// Completes a command that the renderer has carried out.
    pub fn finish(
        &mut self,
        completion: Completion,
        reply: Reply,
        state: &SharedState,
    ) -> Result<Response, CommandError> {
        let mut state = state.lock();
        match completion {
            Completion::Ok => Ok(Response::OK),
            Completion::Respond(answer) => Ok(answer),
            Completion::Capset => Ok(Response {
                type_: VIRTIO_GPU_RESP_OK_CAPSET,
                body: reply.data,
                fence: None,
            }),
            Completion::Created { id, kind } => {
                let entered = state.resources.create_host(id, kind);
                if entered.is_err() {
                    // The driver cannot name the resource, so the renderer must not keep it.
                    let what = ResourceId {
                        resource_id: id.into(),
                        padding: 0.into(),
                    };
                    let call = Request::new(VIRTIO_GPU_CMD_RESOURCE_UNREF, 0, &what);
                    let _ = self.send_unanswered(Box::new(call));
                } else if let Some(file) = reply.file {
                    let cache = reply.head.value;
                    self.files.keep(id, BlobFile { file, cache });
                }
                entered.map(|()| Response::OK)
            }
            Completion::Backed { id, backed } => {
                state.resources.host_mut(id)?.backed = backed;
                Ok(Response::OK)
            }
            Completion::Map { id, offset } => {
                let cache = reply.head.value;
                let memory = BlobFile {
                    file: self.memory_of(reply)?,
                    cache,
                };
                let answer = show(&self.rendering.memory, &mut state, id, offset, &memory);
                self.files.keep(id, memory);
                answer
            }
            Completion::Flush(command) => state.flush(&command),
            Completion::Scanout(command) => {
                let file = self.memory_of(reply)?;
                show_blob(&mut state, &command, file)
            }
            Completion::Texture(command) => show_texture(&mut state, &command, reply),
        }
    }

    /// The memory of a blob that the renderer sent. If this process may not open more files, the cached descriptors
    /// make room.
    fn memory_of(&mut self, reply: Reply) -> Result<File, CommandError> {
        if reply.lost_file {
            self.files.clear();
            return Err(CommandError::RendererFiles);
        }
        reply.file.ok_or(CommandError::Renderer)
    }

    pub(super) fn is_gone(&self) -> bool {
        self.process.is_none()
    }

    fn check_context(&self, id: u32) -> Result<(), CommandError> {
        if self.is_gone() {
            return Err(CommandError::NoRenderer);
        }
        if self.contexts.contains(&id) {
            Ok(())
        } else {
            Err(CommandError::Context(id))
        }
    }

    fn capset_info(&self, command: &GetCapsetInfo) -> Result<CommandOutcome, CommandError> {
        let info = self
            .rendering
            .capsets
            .get(command.capset_index.get() as usize);
        let info = info.ok_or(CommandError::Parameter("capability set"))?;
        let info = RespCapsetInfo {
            capset_id: info.id.into(),
            capset_max_version: info.max_version.into(),
            capset_max_size: info.max_size.into(),
            padding: 0.into(),
        };
        Ok(Response::with(VIRTIO_GPU_RESP_OK_CAPSET_INFO, &info).into())
    }

    fn capset(&self, command: &GetCapset) -> Result<CommandOutcome, CommandError> {
        let known = self.rendering.capsets.iter().any(|info| {
            info.id == command.capset_id.get() && command.capset_version.get() <= info.max_version
        });
        if !known {
            return Err(CommandError::Parameter("capability set"));
        }
        later(
            Request::new(VIRTIO_GPU_CMD_GET_CAPSET, 0, command),
            Completion::Capset,
        )
    }

    fn create_context(
        &mut self,
        id: u32,
        mut command: CtxCreate,
        context: &CommandContext,
    ) -> Result<CommandOutcome, CommandError> {
        if self.is_gone() {
            return Err(CommandError::NoRenderer);
        }
        if id == 0 || self.contexts.contains(&id) || self.contexts.len() >= MAX_CONTEXTS {
            return Err(CommandError::Context(id));
        }
        if context.state.lock().features & VIRTIO_GPU_F_CONTEXT_INIT == 0 {
            command.context_init = 0.into();
        }
        let capset = command.context_init.get() & VIRTIO_GPU_CONTEXT_INIT_CAPSET_ID_MASK;
        let capset = if capset == 0 {
            VIRTIO_GPU_CAPSET_VIRGL
        } else {
            capset
        };
        if command.context_init.get() & !VIRTIO_GPU_CONTEXT_INIT_CAPSET_ID_MASK != 0
            || !self.rendering.capsets.iter().any(|info| info.id == capset)
        {
            return Err(CommandError::Parameter("kind of a context"));
        }
        // Recorded now: a context that the renderer refuses fails there ever after.
        self.contexts.insert(id);
        later(
            Request::new(VIRTIO_GPU_CMD_CTX_CREATE, id, &command),
            Completion::Ok,
        )
    }

    /// Blobs of the context stay mapped. Linux's driver maps a blob until its last user has closed it. A frame that one
    /// program gave to another outlives the first program.
    fn destroy_context(&mut self, id: u32) -> Result<CommandOutcome, CommandError> {
        if self.is_gone() {
            return Ok(Response::OK.into());
        }
        if !self.contexts.remove(&id) {
            return Err(CommandError::Context(id));
        }
        later(
            Request::new(VIRTIO_GPU_CMD_CTX_DESTROY, id, &[0_u8; 0]),
            Completion::Ok,
        )
    }

    fn attach_to_context(
        &mut self,
        type_: u32,
        ctx_id: u32,
        command: ResourceId,
        context: &CommandContext,
    ) -> Result<CommandOutcome, CommandError> {
        if self.is_gone() && type_ == VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE {
            return Ok(Response::OK.into());
        }
        self.check_context(ctx_id)?;
        let state = context.state.lock();
        match state.resources.get(command.resource_id.get())?.kind {
            // virglrenderer reports no result.
            ResourceKind::Host(_) => {
                let call = Request::new(type_, ctx_id, &command);
                Ok(CommandOutcome::DoneAndForward(Box::new(call), Response::OK))
            }
            // Linux attaches whatever a program opens. The renderer needs only its own resources.
            ResourceKind::Image(_) | ResourceKind::Blob(_) => Ok(Response::OK.into()),
        }
    }

    fn submit(
        &mut self,
        ctx_id: u32,
        input: &mut Input,
        context: &CommandContext,
    ) -> Result<CommandOutcome, CommandError> {
        let command: CmdSubmit = input.take()?;
        self.check_context(ctx_id)?;
        let size = u64::from(command.size.get());
        let stream = input.buffers.take_front(size);
        if stream.len() < size {
            return Err(CommandError::Truncated);
        }
        if !size.is_multiple_of(4) || size > MAX_STREAM {
            return Err(CommandError::Parameter("size of a command stream"));
        }
        let entries = stream
            .ranges()
            .map(|(address, len)| MemoryEntry { address, len });
        let mut call = Request::new(VIRTIO_GPU_CMD_SUBMIT_3D, ctx_id, &command);
        call.ranges = ranges(ScatterList::resolve_ram(context.map, entries, size)?);
        later(call, Completion::Ok)
    }

    fn create_blob(
        &mut self,
        ctx_id: u32,
        input: &mut Input,
        context: &CommandContext,
    ) -> Result<CommandOutcome, CommandError> {
        let command: ResourceCreateBlob = input.take()?;
        let mut state = context.state.lock();
        if command.blob_mem.get() != VIRTIO_GPU_BLOB_MEM_HOST3D {
            return Ok(state.create_blob(&command, input, context.map)?.into());
        }
        if state.features & VIRTIO_GPU_F_RESOURCE_BLOB == 0 {
            return Err(CommandError::Unknown(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB));
        }
        self.check_context(ctx_id)?;
        let (id, size) = (command.resource_id.get(), command.size.get());
        let flags = command.blob_flags.get();
        if flags & !VIRTIO_GPU_BLOB_FLAGS != 0 {
            return Err(CommandError::Parameter("flags of a blob"));
        }
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) {
            return Err(CommandError::Parameter("size of a blob"));
        }
        if command.nr_entries.get() != 0 {
            return Err(CommandError::Parameter("number of entries"));
        }
        state.resources.check_new(id)?;
        let shared = VIRTIO_GPU_BLOB_FLAG_USE_SHAREABLE | VIRTIO_GPU_BLOB_FLAG_USE_CROSS_DEVICE;
        let kind = HostKind::Blob {
            len: size,
            shareable: flags & shared != 0,
        };
        later(
            Request::new(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, ctx_id, &command),
            Completion::Created { id, kind },
        )
    }

    fn map_blob(
        &mut self,
        command: &ResourceMapBlob,
        context: &CommandContext,
    ) -> Result<CommandOutcome, CommandError> {
        let mut state = context.state.lock();
        let id = command.resource_id.get();
        let host = state.resources.host_mut(id)?;
        let HostKind::Blob { .. } = host.kind else {
            return Err(CommandError::Resource(id));
        };
        if host.mapped.is_some() {
            return Err(CommandError::Backing("is shown already"));
        }
        // Offset and length are checked by the mapping.
        let offset = command.offset.get();
        if let Some(memory) = self.files.get(id) {
            let region = &self.rendering.memory;
            return Ok(show(region, &mut state, id, offset, memory)?.into());
        }
        let what = ResourceId {
            resource_id: id.into(),
            padding: 0.into(),
        };
        later(
            Request::new(REQUEST_EXPORT, 0, &what),
            Completion::Map { id, offset },
        )
    }

    fn unmap_blob(
        &mut self,
        command: ResourceId,
        context: &CommandContext,
    ) -> Result<CommandOutcome, CommandError> {
        let mut state = context.state.lock();
        let host = state.resources.host_mut(command.resource_id.get())?;
        let offset = host.mapped.ok_or(CommandError::Backing("is not shown"))?;
        self.rendering
            .memory
            .unmap(offset)
            .map_err(CommandError::Map)?;
        host.mapped = None;
        Ok(Response::OK.into())
    }

    fn unref(
        &mut self,
        command: ResourceId,
        context: &CommandContext,
    ) -> Result<CommandOutcome, CommandError> {
        let mut state = context.state.lock();
        let mut is_host = false;
        if let ResourceKind::Host(host) = &state.resources.get(command.resource_id.get())?.kind {
            is_host = true;
            if let Some(offset) = host.mapped {
                self.rendering
                    .memory
                    .unmap(offset)
                    .map_err(CommandError::Map)?;
            }
        }
        let answer = state.unref(command)?;
        self.files.forget(command.resource_id.get());
        if is_host && !self.is_gone() {
            let call = Request::new(VIRTIO_GPU_CMD_RESOURCE_UNREF, 0, &command);
            return Ok(CommandOutcome::DoneAndForward(Box::new(call), answer));
        }
        Ok(answer.into())
    }

    fn detach(
        &mut self,
        command: ResourceId,
        context: &CommandContext,
    ) -> Result<CommandOutcome, CommandError> {
        let mut state = context.state.lock();
        let id = command.resource_id.get();
        let Ok(host) = state.resources.host_mut(id) else {
            return Ok(state.detach(command)?.into());
        };
        if !host.backed {
            return Err(CommandError::Backing("is not there"));
        }
        if self.is_gone() {
            host.backed = false;
            return Ok(Response::OK.into());
        }
        later(
            Request::new(VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING, 0, &command),
            Completion::Backed { id, backed: false },
        )
    }
}

/// Maps the memory of a blob into the host-visible region.
fn show(
    region: &HostMemory,
    state: &mut State,
    id: u32,
    offset: u64,
    memory: &BlobFile,
) -> Result<Response, CommandError> {
    let host = state.resources.host_mut(id)?;
    let HostKind::Blob { len, shareable } = host.kind else {
        return Err(CommandError::Resource(id));
    };
    region
        .map(offset, len, &memory.file, shareable)
        .map_err(CommandError::Map)?;
    host.mapped = Some(offset);
    let info = RespMapInfo {
        map_info: memory.cache.into(),
        padding: 0.into(),
    };
    Ok(Response::with(VIRTIO_GPU_RESP_OK_MAP_INFO, &info))
}

fn create_3d(
    command: ResourceCreate3d,
    context: &CommandContext,
) -> Result<CommandOutcome, CommandError> {
    let id = command.resource_id.get();
    context.state.lock().resources.check_new(id)?;
    let kind = HostKind::Texture {
        width: command.width.get(),
        height: command.height.get(),
        format: command.format.get(),
    };
    later(
        Request::new(VIRTIO_GPU_CMD_RESOURCE_CREATE_3D, 0, &command),
        Completion::Created { id, kind },
    )
}

fn attach(input: &mut Input, context: &CommandContext) -> Result<CommandOutcome, CommandError> {
    let command: ResourceAttachBacking = input.take()?;
    let mut state = context.state.lock();
    let id = command.resource_id.get();
    let Ok(host) = state.resources.host_mut(id) else {
        return Ok(state.attach(&command, input, context.map)?.into());
    };
    if host.backed {
        return Err(CommandError::Backing("is there already"));
    }
    let entries = input.entries(command.nr_entries.get())?;
    let size = entries.iter().map(|entry| entry.len).sum();
    let memory = ScatterList::resolve_ram(context.map, entries, size)?;
    let mut call = Request::new(VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING, 0, &command);
    call.ranges = ranges(memory);
    later(call, Completion::Backed { id, backed: true })
}

fn ranges(memory: ScatterList) -> Vec<RamRange> {
    let pieces = memory.into_pieces().into_iter();
    pieces
        .map(|piece| RamRange {
            offset: piece.offset,
            len: piece.len,
        })
        .collect()
}
