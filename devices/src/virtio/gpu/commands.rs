//! Commands (Virtio 1.4, 5.7.6): read once from guest memory, checked in 64 bits, answered.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{
    cursor::CursorImage,
    display::State,
    edid::edid,
    format::Format,
    output::{OUTPUTS, positions},
    protocol::*,
    resource::{HostKind, Kind, MAX_ENTRIES},
    scanout::{Area, Layout, Scanout},
    transfer::transfer,
    watch::Hold,
};
use crate::{
    GuestMemory,
    dmabuf::{BufferError, MemoryEntry, ScatterError},
    memory::{AddressSpace, ArenaError},
    virtio::queue::Buffers,
};
use fanlight_arch::layout::PAGE_SIZE;

/// What every blob's size must be a multiple of.
pub const BLOB_ALIGNMENT: u32 = PAGE_SIZE as u32;

/// Why a command is refused. All but the last two are the driver's mistakes.
#[derive(Debug, Error)]
pub enum CommandError {
    /// The request holds less than the command.
    #[error("the command ends early")]
    Truncated,
    /// No such command, or none without a feature that was not negotiated.
    #[error("no such command: {0:#x}")]
    Unknown(u32),
    /// No such output.
    #[error("no such scanout: {0}")]
    Scanout(u32),
    /// No such resource, or one too many of this id.
    #[error("resource {0} is not there, or there already, or of another kind")]
    Resource(u32),
    /// A value that makes no sense.
    #[error("bad {0}")]
    Parameter(&'static str),
    /// Entries that are not memory.
    #[error(transparent)]
    Memory(#[from] ScatterError),
    /// Memory is attached twice, or detached or used without being there.
    #[error("the resource's memory {0}")]
    Backing(&'static str),
    /// The guest has as much of the host's memory as it may.
    #[error("{0} more bytes pass max-resource-memory, or there are too many resources")]
    OutOfMemory(u64),
    /// The host failed.
    #[error("the host has no memory for it")]
    Host(#[source] io::Error),
    /// The host cannot read what it should.
    #[error(transparent)]
    Buffer(#[from] BufferError),
    /// No such context, or one of this id already, or one too many.
    #[error("context {0} is not there, or there already, or there are too many")]
    Context(u32),
    /// A blob cannot be shown.
    #[error("cannot show the blob")]
    Map(#[source] ArenaError),
    /// The renderer has ended, and takes no more until the driver resets the device.
    #[error("the renderer has ended")]
    NoRenderer,
    /// The renderer would not.
    #[error("the renderer refused it")]
    Renderer,
    /// The renderer has as many descriptors as it may.
    #[error(
        "the renderer has no descriptor left for a blob: raise the limit on open files (ulimit -Hn) that Fanlight \
         is started with"
    )]
    RendererFiles,
}

impl CommandError {
    /// Whether a limit of the host's is why, which its owner can raise.
    pub fn is_of_host(&self) -> bool {
        matches!(
            self,
            Self::Host(_)
                | Self::RendererFiles
                | Self::Map(ArenaError::Host { .. } | ArenaError::TooMany(_))
        )
    }
}

impl CommandError {
    /// The specification's error (5.7.6.7).
    pub fn response(&self) -> u32 {
        match self {
            Self::Truncated | Self::Parameter(_) | Self::Memory(_) => {
                VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER
            }
            Self::Unknown(_)
            | Self::Backing(_)
            | Self::Buffer(_)
            | Self::NoRenderer
            | Self::Renderer => VIRTIO_GPU_RESP_ERR_UNSPEC,
            Self::Context(_) => VIRTIO_GPU_RESP_ERR_INVALID_CONTEXT_ID,
            Self::Map(ArenaError::Host { .. } | ArenaError::TooMany(_) | ArenaError::Lost) => {
                VIRTIO_GPU_RESP_ERR_OUT_OF_MEMORY
            }
            Self::Map(_) => VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER,
            Self::Scanout(_) => VIRTIO_GPU_RESP_ERR_INVALID_SCANOUT_ID,
            Self::Resource(_) => VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID,
            Self::OutOfMemory(_) | Self::Host(_) | Self::RendererFiles => {
                VIRTIO_GPU_RESP_ERR_OUT_OF_MEMORY
            }
        }
    }
}

/// What the driver wrote, read from front to back.
#[derive(Debug)]
pub struct Input<'a> {
    /// Guest memory.
    pub mem: &'a GuestMemory,
    /// What is left of the request.
    pub buffers: Buffers,
}

impl Input<'_> {
    /// The next structure.
    pub fn take<T: FromBytes + IntoBytes + Immutable>(&mut self) -> Result<T, CommandError> {
        let mut value = T::new_zeroed();
        self.read(value.as_mut_bytes())?;
        Ok(value)
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), CommandError> {
        let part = self.buffers.take_front(bytes.len() as u64);
        if part.len() < bytes.len() as u64 {
            return Err(CommandError::Truncated);
        }
        part.read(self.mem, bytes)
            .map_err(|_| CommandError::Truncated)
    }

    /// The list of `count` entries that follows.
    pub fn entries(&mut self, count: u32) -> Result<Vec<MemoryEntry>, CommandError> {
        if count > MAX_ENTRIES {
            return Err(CommandError::Parameter("number of entries"));
        }
        let mut entries = vec![MemEntry::default(); count as usize];
        self.read(entries.as_mut_bytes())?;
        let entries = entries.iter().map(|entry| MemoryEntry {
            address: entry.addr.get(),
            len: entry.length.get().into(),
        });
        Ok(entries.collect())
    }
}

/// What goes back to the driver, behind the header.
#[derive(Debug)]
pub struct Answer {
    /// Type of the response.
    pub type_: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// Who must be done with what is on screen before a fenced answer is given.
    pub hold: Option<Hold>,
}

impl Answer {
    pub const OK: Self = Self {
        type_: VIRTIO_GPU_RESP_OK_NODATA,
        body: Vec::new(),
        hold: None,
    };

    pub fn with(type_: u32, body: &(impl IntoBytes + Immutable)) -> Self {
        Self {
            type_,
            body: body.as_bytes().into(),
            hold: None,
        }
    }
}

impl From<&CommandError> for Answer {
    fn from(error: &CommandError) -> Self {
        Self {
            type_: error.response(),
            ..Self::OK
        }
    }
}

pub fn scanout_index(id: u32) -> Result<usize, CommandError> {
    let index = id as usize;
    if index < OUTPUTS {
        Ok(index)
    } else {
        Err(CommandError::Scanout(id))
    }
}

pub fn area(rect: &Rect) -> Result<Area, CommandError> {
    Area::from_wire(rect).ok_or(CommandError::Parameter("rectangle"))
}

fn format(id: u32) -> Result<Format, CommandError> {
    Format::from_id(id).ok_or(CommandError::Parameter("format"))
}

impl State {
    /// Carries out a command of the control queue.
    pub(super) fn control(
        &mut self,
        type_: u32,
        input: &mut Input,
        map: &AddressSpace,
    ) -> Result<Answer, CommandError> {
        let needs = match type_ {
            VIRTIO_GPU_CMD_GET_EDID => VIRTIO_GPU_F_EDID,
            VIRTIO_GPU_CMD_RESOURCE_ASSIGN_UUID => VIRTIO_GPU_F_RESOURCE_UUID,
            VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB | VIRTIO_GPU_CMD_SET_SCANOUT_BLOB => {
                VIRTIO_GPU_F_RESOURCE_BLOB
            }
            _ => 0,
        };
        if self.features & needs != needs {
            return Err(CommandError::Unknown(type_));
        }
        match type_ {
            VIRTIO_GPU_CMD_GET_DISPLAY_INFO => Ok(self.display_info()),
            VIRTIO_GPU_CMD_GET_EDID => self.get_edid(&input.take()?),
            VIRTIO_GPU_CMD_RESOURCE_CREATE_2D => self.create_2d(&input.take()?),
            VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB => self.create_blob(&input.take()?, input, map),
            VIRTIO_GPU_CMD_RESOURCE_UNREF => self.unref(input.take()?),
            VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING => self.attach(&input.take()?, input, map),
            VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING => self.detach(input.take()?),
            VIRTIO_GPU_CMD_RESOURCE_ASSIGN_UUID => self.assign_uuid(input.take()?),
            VIRTIO_GPU_CMD_SET_SCANOUT => self.set_scanout_2d(&input.take()?),
            VIRTIO_GPU_CMD_SET_SCANOUT_BLOB => self.set_scanout_blob(&input.take()?),
            VIRTIO_GPU_CMD_TRANSFER_TO_HOST_2D => self.transfer(&input.take()?, input.mem),
            VIRTIO_GPU_CMD_RESOURCE_FLUSH => self.flush(&input.take()?),
            // There are none (num_capsets): every index is wrong.
            VIRTIO_GPU_CMD_GET_CAPSET_INFO | VIRTIO_GPU_CMD_GET_CAPSET => {
                Err(CommandError::Parameter("capability set"))
            }
            _ => Err(CommandError::Unknown(type_)),
        }
    }

    /// Carries out a command of the cursor queue.
    pub(super) fn cursor(&mut self, type_: u32, input: &mut Input) -> Result<Answer, CommandError> {
        if !matches!(
            type_,
            VIRTIO_GPU_CMD_UPDATE_CURSOR | VIRTIO_GPU_CMD_MOVE_CURSOR
        ) {
            return Err(CommandError::Unknown(type_));
        }
        let command: UpdateCursor = input.take()?;
        let index = scanout_index(command.scanout_id.get())?;
        if type_ == VIRTIO_GPU_CMD_UPDATE_CURSOR {
            let image = match command.resource_id.get() {
                0 => None,
                id => Some(CursorImage::read(
                    self.resources.get(id)?,
                    id,
                    command.hot_x.get(),
                    command.hot_y.get(),
                )?),
            };
            self.cursors[index].image = image.map(Into::into);
            self.watches.cursor_image(index);
        }
        // Left of and above the screen in two's complement.
        self.cursors[index].x = command.x.get().cast_signed();
        self.cursors[index].y = command.y.get().cast_signed();
        self.watches.cursor_position(index);
        Ok(Answer::OK)
    }

    fn display_info(&mut self) -> Answer {
        self.heard.info();
        let mut info = RespDisplayInfo::default();
        let positions = positions(&self.outputs);
        for ((one, output), x) in info.pmodes.iter_mut().zip(&self.outputs).zip(positions) {
            if output.connected {
                one.enabled = 1.into();
                one.r.x = x.into();
                one.r.width = output.mode.width.into();
                one.r.height = output.mode.height.into();
            }
        }
        Answer::with(VIRTIO_GPU_RESP_OK_DISPLAY_INFO, &info)
    }

    fn get_edid(&mut self, command: &GetEdid) -> Result<Answer, CommandError> {
        let index = scanout_index(command.scanout.get())?;
        self.heard.edid(index);
        let edid = edid(self.outputs[index].mode, &self.name, index);
        let mut answer = RespEdid {
            size: (edid.len() as u32).into(),
            ..Default::default()
        };
        answer.edid[..edid.len()].copy_from_slice(&edid);
        Ok(Answer::with(VIRTIO_GPU_RESP_OK_EDID, &answer))
    }

    fn create_2d(&mut self, command: &ResourceCreate2d) -> Result<Answer, CommandError> {
        let format = format(command.format.get())?;
        let (width, height) = (command.width.get(), command.height.get());
        self.resources
            .create_2d(command.resource_id.get(), format, width, height)?;
        Ok(Answer::OK)
    }

    pub(super) fn create_blob(
        &mut self,
        command: &ResourceCreateBlob,
        input: &mut Input,
        map: &AddressSpace,
    ) -> Result<Answer, CommandError> {
        if command.blob_mem.get() != VIRTIO_GPU_BLOB_MEM_GUEST {
            return Err(CommandError::Parameter("memory of a blob"));
        }
        if command.blob_flags.get() & !VIRTIO_GPU_BLOB_FLAGS != 0 {
            return Err(CommandError::Parameter("flags of a blob"));
        }
        let (id, size) = (command.resource_id.get(), command.size.get());
        if self.features & VIRTIO_GPU_F_BLOB_ALIGNMENT != 0
            && !size.is_multiple_of(BLOB_ALIGNMENT.into())
        {
            return Err(CommandError::Parameter("alignment of a blob"));
        }
        let entries = input.entries(command.nr_entries.get())?;
        self.resources.create_blob(id, size, &entries, map)?;
        Ok(Answer::OK)
    }

    pub(super) fn unref(&mut self, command: ResourceId) -> Result<Answer, CommandError> {
        let id = command.resource_id.get();
        self.resources.remove(id)?;
        for index in 0..OUTPUTS {
            if self.scanouts[index].is_some_and(|scanout| scanout.resource == id) {
                self.set_scanout(index, None);
            }
        }
        Ok(Answer::OK)
    }

    pub(super) fn attach(
        &mut self,
        command: &ResourceAttachBacking,
        input: &mut Input,
        map: &AddressSpace,
    ) -> Result<Answer, CommandError> {
        let id = command.resource_id.get();
        let entries = input.entries(command.nr_entries.get())?;
        self.resources.attach(id, &entries, map)?;
        self.memory_changed(id);
        Ok(Answer::OK)
    }

    pub(super) fn detach(&mut self, command: ResourceId) -> Result<Answer, CommandError> {
        let id = command.resource_id.get();
        self.resources.detach(id)?;
        self.memory_changed(id);
        Ok(Answer::OK)
    }

    /// A blob on screen has other memory, or none: the driver does not set the scanout again.
    pub(super) fn memory_changed(&mut self, id: u32) {
        if let Ok(resource) = self.resources.get(id)
            && matches!(resource.kind, Kind::Blob(_))
        {
            for (index, scanout) in self.scanouts.iter().enumerate() {
                if scanout.is_some_and(|scanout| scanout.resource == id) {
                    self.watches.scanout(index);
                }
            }
        }
    }

    fn assign_uuid(&mut self, command: ResourceId) -> Result<Answer, CommandError> {
        let resource = self.resources.get_mut(command.resource_id.get())?;
        let uuid = match resource.uuid {
            Some(uuid) => uuid,
            None => *resource.uuid.insert(random_uuid()?),
        };
        Ok(Answer::with(
            VIRTIO_GPU_RESP_OK_RESOURCE_UUID,
            &RespResourceUuid { uuid },
        ))
    }

    pub(super) fn set_scanout_2d(&mut self, command: &SetScanout) -> Result<Answer, CommandError> {
        let index = scanout_index(command.scanout_id.get())?;
        let id = command.resource_id.get();
        if id == 0 {
            self.set_scanout(index, None);
            return Ok(Answer::OK);
        }
        let layout = match &self.resources.get(id)?.kind {
            Kind::Image(image) => Layout {
                format: image.format,
                width: image.width,
                height: image.height,
                stride: image.stride,
                offset: 0,
            },
            Kind::Host(_) => self.resources.show(id)?,
            Kind::Blob(_) => return Err(CommandError::Resource(id)),
        };
        let area = area(&command.r)?;
        if !area.is_within(layout.width, layout.height) {
            return Err(CommandError::Parameter("rectangle"));
        }
        self.set_scanout(
            index,
            Some(Scanout {
                resource: id,
                layout,
                area,
            }),
        );
        Ok(Answer::OK)
    }

    pub(super) fn set_scanout_blob(
        &mut self,
        command: &SetScanoutBlob,
    ) -> Result<Answer, CommandError> {
        let index = scanout_index(command.scanout_id.get())?;
        let id = command.resource_id.get();
        if id == 0 {
            self.set_scanout(index, None);
            return Ok(Answer::OK);
        }
        let size = match &self.resources.get(id)?.kind {
            Kind::Blob(blob) => blob.size,
            Kind::Host(host) if host.pixels.is_some() => match host.kind {
                HostKind::Blob { len, .. } => len,
                HostKind::Texture { .. } => return Err(CommandError::Resource(id)),
            },
            Kind::Host(_) | Kind::Image(_) => return Err(CommandError::Resource(id)),
        };
        let layout = Layout {
            format: format(command.format.get())?,
            width: command.width.get(),
            height: command.height.get(),
            stride: command.strides[0].get(),
            offset: command.offsets[0].get(),
        };
        layout.check(size)?;
        let area = area(&command.r)?;
        if !area.is_within(layout.width, layout.height) {
            return Err(CommandError::Parameter("rectangle"));
        }
        self.set_scanout(
            index,
            Some(Scanout {
                resource: id,
                layout,
                area,
            }),
        );
        Ok(Answer::OK)
    }

    fn transfer(
        &mut self,
        command: &TransferToHost2d,
        mem: &GuestMemory,
    ) -> Result<Answer, CommandError> {
        let area = area(&command.r)?;
        match &self.resources.get(command.resource_id.get())?.kind {
            Kind::Image(image) => {
                self.statistics.transferred_bytes +=
                    transfer(mem, image, area, command.offset.get())?;
            }
            // Linux transfers blobs too; their pixels are where they belong.
            Kind::Blob(_) => {}
            Kind::Host(_) => return Err(CommandError::Resource(command.resource_id.get())),
        }
        Ok(Answer::OK)
    }

    pub(super) fn flush(&mut self, command: &ResourceFlush) -> Result<Answer, CommandError> {
        let id = command.resource_id.get();
        let flushed = area(&command.r)?;
        let mut shown = self.scanouts.iter().flatten();
        let fits = match &self.resources.get(id)?.kind {
            Kind::Image(image) => flushed.is_within(image.width, image.height),
            // Others have a size in pixels only where they are shown.
            Kind::Blob(_) | Kind::Host(_) => {
                let fits = |s: &Scanout| flushed.is_within(s.layout.width, s.layout.height);
                let mut shown = shown.by_ref().filter(|s| s.resource == id).peekable();
                shown.peek().is_none() || shown.any(fits)
            }
        };
        if !fits {
            return Err(CommandError::Parameter("rectangle"));
        }
        self.statistics.flushes += 1;
        let mut hold = self.watches.next_flush();
        for (index, scanout) in self.scanouts.iter().enumerate() {
            if let Some(scanout) = scanout
                && scanout.resource == id
                && let Some(damage) = scanout.damage(&flushed)
            {
                self.watches.flushed(index, damage, &mut hold);
            }
        }
        Ok(Answer {
            hold: Some(hold),
            ..Answer::OK
        })
    }
}

/// A random UUID (RFC 9562, version 4).
fn random_uuid() -> Result<[u8; 16], CommandError> {
    let mut uuid = [0; 16];
    // As few bytes as these come whole.
    getrandom(&mut uuid, GetRandomFlags::empty())
        .map_err(|error| CommandError::Host(error.into()))?;
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Ok(uuid)
}
