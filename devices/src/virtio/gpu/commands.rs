//! Commands (Virtio 1.4, 5.7.6) as the device itself carries them out.

use std::sync::atomic::Ordering;

use rustix::rand::{GetRandomFlags, getrandom};

use super::{
    cursor::CursorImage,
    edid::edid,
    error::CommandError,
    geometry::Layout,
    output::{OUTPUTS, positions},
    protocol::*,
    request::{Input, area, format, scanout_index},
    resource::{HostKind, ResourceKind},
    response::Response,
    scanout::Scanout,
    state::State,
    transfer::transfer,
};
use crate::{GuestMemory, memory::AddressSpace};
use fanlight_arch::layout::PAGE_SIZE;

/// What every blob's size must be a multiple of.
pub const BLOB_ALIGNMENT: u32 = PAGE_SIZE as u32;

impl State {
    /// Carries out a command of the control queue.
    pub(super) fn control(
        &mut self,
        type_: u32,
        input: &mut Input,
        map: &AddressSpace,
    ) -> Result<Response, CommandError> {
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
    pub(super) fn cursor(
        &mut self,
        type_: u32,
        input: &mut Input,
    ) -> Result<Response, CommandError> {
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
            self.subscribers.cursor_image(index);
        }
        // Left of and above the screen in two's complement.
        self.cursors[index].x = command.x.get().cast_signed();
        self.cursors[index].y = command.y.get().cast_signed();
        self.subscribers.cursor_position(index);
        Ok(Response::OK)
    }

    fn display_info(&mut self) -> Response {
        self.stale_info.display_info_read();
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
        Response::with(VIRTIO_GPU_RESP_OK_DISPLAY_INFO, &info)
    }

    fn get_edid(&mut self, command: &GetEdid) -> Result<Response, CommandError> {
        let index = scanout_index(command.scanout.get())?;
        self.stale_info.edid_read(index);
        let edid = edid(self.outputs[index].mode, &self.name, index);
        let mut response = RespEdid {
            size: (edid.len() as u32).into(),
            ..Default::default()
        };
        response.edid[..edid.len()].copy_from_slice(&edid);
        Ok(Response::with(VIRTIO_GPU_RESP_OK_EDID, &response))
    }

    fn create_2d(&mut self, command: &ResourceCreate2d) -> Result<Response, CommandError> {
        let format = format(command.format.get())?;
        let (width, height) = (command.width.get(), command.height.get());
        self.resources
            .create_2d(command.resource_id.get(), format, width, height)?;
        Ok(Response::OK)
    }

    pub(super) fn create_blob(
        &mut self,
        command: &ResourceCreateBlob,
        input: &mut Input,
        map: &AddressSpace,
    ) -> Result<Response, CommandError> {
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
        Ok(Response::OK)
    }

    pub(super) fn unref(&mut self, command: ResourceId) -> Result<Response, CommandError> {
        let id = command.resource_id.get();
        self.resources.remove(id)?;
        for index in 0..OUTPUTS {
            if self.scanouts[index].is_some_and(|scanout| scanout.resource == id) {
                self.set_scanout(index, None);
            }
        }
        Ok(Response::OK)
    }

    pub(super) fn attach(
        &mut self,
        command: &ResourceAttachBacking,
        input: &mut Input,
        map: &AddressSpace,
    ) -> Result<Response, CommandError> {
        let id = command.resource_id.get();
        let entries = input.entries(command.nr_entries.get())?;
        self.resources.attach(id, &entries, map)?;
        self.memory_changed(id);
        Ok(Response::OK)
    }

    pub(super) fn detach(&mut self, command: ResourceId) -> Result<Response, CommandError> {
        let id = command.resource_id.get();
        self.resources.detach(id)?;
        self.memory_changed(id);
        Ok(Response::OK)
    }

    /// The memory of a shown blob changed: the driver does not set the scanout again.
    pub(super) fn memory_changed(&mut self, id: u32) {
        if let Ok(resource) = self.resources.get(id)
            && matches!(resource.kind, ResourceKind::Blob(_))
        {
            for (index, scanout) in self.scanouts.iter().enumerate() {
                if scanout.is_some_and(|scanout| scanout.resource == id) {
                    self.subscribers.scanout(index);
                }
            }
        }
    }

    fn assign_uuid(&mut self, command: ResourceId) -> Result<Response, CommandError> {
        let resource = self.resources.get_mut(command.resource_id.get())?;
        let uuid = match resource.uuid {
            Some(uuid) => uuid,
            None => *resource.uuid.insert(random_uuid()?),
        };
        Ok(Response::with(
            VIRTIO_GPU_RESP_OK_RESOURCE_UUID,
            &RespResourceUuid { uuid },
        ))
    }

    pub(super) fn set_scanout_2d(
        &mut self,
        command: &SetScanout,
    ) -> Result<Response, CommandError> {
        let index = scanout_index(command.scanout_id.get())?;
        let id = command.resource_id.get();
        if id == 0 {
            self.set_scanout(index, None);
            return Ok(Response::OK);
        }
        let layout = match &self.resources.get(id)?.kind {
            ResourceKind::Image(image) => Layout {
                format: image.format,
                width: image.width,
                height: image.height,
                stride: image.stride,
                offset: 0,
            },
            ResourceKind::Host(_) => self.resources.show(id)?,
            ResourceKind::Blob(_) => return Err(CommandError::Resource(id)),
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
        Ok(Response::OK)
    }

    pub(super) fn set_scanout_blob(
        &mut self,
        command: &SetScanoutBlob,
    ) -> Result<Response, CommandError> {
        let index = scanout_index(command.scanout_id.get())?;
        let id = command.resource_id.get();
        if id == 0 {
            self.set_scanout(index, None);
            return Ok(Response::OK);
        }
        let size = match &self.resources.get(id)?.kind {
            ResourceKind::Blob(blob) => blob.size,
            ResourceKind::Host(host) if host.pixels.is_some() => match host.kind {
                HostKind::Blob { len, .. } => len,
                HostKind::Texture { .. } => return Err(CommandError::Resource(id)),
            },
            ResourceKind::Host(_) | ResourceKind::Image(_) => {
                return Err(CommandError::Resource(id));
            }
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
        Ok(Response::OK)
    }

    fn transfer(
        &mut self,
        command: &TransferToHost2d,
        mem: &GuestMemory,
    ) -> Result<Response, CommandError> {
        let area = area(&command.r)?;
        match &self.resources.get(command.resource_id.get())?.kind {
            ResourceKind::Image(image) => {
                let bytes = transfer(mem, image, area, command.offset.get())?;
                self.copied.fetch_add(bytes, Ordering::Relaxed);
            }
            // Linux transfers blobs too; their pixels are in place already.
            ResourceKind::Blob(_) => {}
            ResourceKind::Host(_) => return Err(CommandError::Resource(command.resource_id.get())),
        }
        Ok(Response::OK)
    }

    pub(super) fn flush(&mut self, command: &ResourceFlush) -> Result<Response, CommandError> {
        let id = command.resource_id.get();
        let flushed = area(&command.r)?;
        let mut shown = self.scanouts.iter().flatten();
        let fits = match &self.resources.get(id)?.kind {
            ResourceKind::Image(image) => flushed.is_within(image.width, image.height),
            // Other resources have a size in pixels only where they are shown.
            ResourceKind::Blob(_) | ResourceKind::Host(_) => {
                let fits = |s: &Scanout| flushed.is_within(s.layout.width, s.layout.height);
                let mut shown = shown.by_ref().filter(|s| s.resource == id).peekable();
                shown.peek().is_none() || shown.any(fits)
            }
        };
        if !fits {
            return Err(CommandError::Parameter("rectangle"));
        }
        self.statistics.flushes += 1;
        let mut fence = self.subscribers.next_flush();
        for (index, scanout) in self.scanouts.iter().enumerate() {
            if let Some(scanout) = scanout
                && scanout.resource == id
                && let Some(damage) = scanout.damage(&flushed)
            {
                self.subscribers.flushed(index, damage, &mut fence);
            }
        }
        Ok(Response {
            fence: Some(fence),
            ..Response::OK
        })
    }
}

/// A random UUID (RFC 9562, version 4).
fn random_uuid() -> Result<[u8; 16], CommandError> {
    let mut uuid = [0; 16];
    // So few bytes are returned whole.
    getrandom(&mut uuid, GetRandomFlags::empty())
        .map_err(|error| CommandError::Host(error.into()))?;
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Ok(uuid)
}
