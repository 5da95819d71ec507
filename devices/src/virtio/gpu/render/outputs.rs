//! Textures and blobs of the renderer on outputs.

use std::{fs::File, sync::atomic::Ordering};

use fanlight_arch::layout::PAGE_SIZE;
use zerocopy::FromBytes;

use super::{
    super::{
        error::CommandError,
        format::Format,
        geometry::Area,
        protocol::*,
        request::area,
        resource::{CopyTo, ExportedLayout, HostKind},
        response::Response,
        scanout::Scanout,
        state::State,
    },
    completion::{CommandContext, CommandOutcome, Completion, later},
    renderer::Renderer,
    wire::{
        REQUEST_EXPORT, REQUEST_EXPORT_TEXTURE, REQUEST_READ_BACK, ReadBack, Reply, Request,
        TextureLayout,
    },
};

impl Renderer {
    /// The memory of a texture is requested when an output is to show it for the first time.
    pub(super) fn set_scanout(
        &self,
        command: &SetScanout,
        context: &CommandContext,
    ) -> Result<CommandOutcome, CommandError> {
        let mut state = context.state.lock();
        let id = command.resource_id.get();
        if !self.is_gone()
            && let Ok(host) = state.resources.host_mut(id)
            && let HostKind::Texture { .. } = host.kind
            && host.shown.is_none()
            && !host.no_export
        {
            let what = ResourceId {
                resource_id: id.into(),
                padding: 0.into(),
            };
            let call = Request::new(REQUEST_EXPORT_TEXTURE, 0, &what);
            return later(call, Completion::Texture(*command));
        }
        Ok(state.set_scanout_2d(command)?.into())
    }

    /// The memory of a blob is requested when an output is to show it for the first time, unless its descriptor is
    /// cached.
    pub(super) fn set_scanout_blob(
        &mut self,
        command: &SetScanoutBlob,
        context: &CommandContext,
    ) -> Result<CommandOutcome, CommandError> {
        let mut state = context.state.lock();
        let id = command.resource_id.get();
        if state.features & VIRTIO_GPU_F_RESOURCE_BLOB == 0 {
            return Err(CommandError::Unknown(VIRTIO_GPU_CMD_SET_SCANOUT_BLOB));
        }
        match state.resources.host_mut(id) {
            Ok(host) if host.pixels.is_none() && matches!(host.kind, HostKind::Blob { .. }) => {
                let file = self.files.get(id).map(|memory| memory.file.try_clone());
                if let Some(file) = file.transpose().map_err(CommandError::Host)? {
                    return Ok(show_blob(&mut state, command, file)?.into());
                }
                let what = ResourceId {
                    resource_id: id.into(),
                    padding: 0.into(),
                };
                let call = Request::new(REQUEST_EXPORT, 0, &what);
                later(call, Completion::Scanout(*command))
            }
            _ => Ok(state.set_scanout_blob(command)?.into()),
        }
    }

    /// A shown texture is finished before its flush, and read back if its own memory is not what outputs show.
    /// Without a renderer the last frame stays.
    pub(super) fn flush(
        &mut self,
        command: ResourceFlush,
        context: &CommandContext,
    ) -> Result<CommandOutcome, CommandError> {
        let mut state = context.state.lock();
        let id = command.resource_id.get();
        let flushed = area(&command.r)?;
        let visible = visible(&state, id, &flushed);
        let copied = state.copied.clone();
        if !self.is_gone()
            && let Some(visible) = visible
            && let Ok(host) = state.resources.host_mut(id)
            && let Some(shown) = &host.shown
        {
            let stride = shown.layout.stride;
            let (file, body) = match &shown.copy {
                CopyTo::Shown(file) => {
                    let pixels = u64::from(visible.width) * u64::from(visible.height);
                    copied.fetch_add(pixels * u64::from(Format::BYTES), Ordering::Relaxed);
                    let row = u64::from(visible.y) * u64::from(stride);
                    let body = ReadBack {
                        resource: id,
                        stride,
                        x: visible.x,
                        y: visible.y,
                        width: visible.width,
                        height: visible.height,
                        offset: row + u64::from(visible.x) * 4,
                        size: shown.surface.buffer.size(),
                    };
                    (file, body)
                }
                CopyTo::Nowhere(file) => {
                    let body = ReadBack {
                        resource: id,
                        stride: Format::BYTES,
                        x: visible.x,
                        y: visible.y,
                        width: 1,
                        height: 1,
                        offset: 0,
                        size: PAGE_SIZE,
                    };
                    (file, body)
                }
            };
            let mut call = Request::new(REQUEST_READ_BACK, 0, &body);
            call.file = Some(file.try_clone().map_err(CommandError::Host)?);
            return later(call, Completion::Flush(command));
        }
        Ok(state.flush(&command)?.into())
    }
}

/// The resources that outputs show.
fn on_outputs(state: &State) -> Vec<u32> {
    let shown = state.scanouts.iter().flatten();
    shown.map(|scanout: &Scanout| scanout.resource).collect()
}

/// The part of a flushed rectangle that some output shows.
fn visible(state: &State, id: u32, flushed: &Area) -> Option<Area> {
    let shown = state.scanouts.iter().flatten();
    let shown = shown.filter(|scanout: &&Scanout| scanout.resource == id);
    let parts = shown.filter_map(|scanout| flushed.intersection(&scanout.area));
    parts.reduce(|one, other| one.union(&other))
}

pub(super) fn show_blob(
    state: &mut State,
    command: &SetScanoutBlob,
    file: File,
) -> Result<Response, CommandError> {
    let on_outputs = on_outputs(state);
    let id = command.resource_id.get();
    state.resources.show_blob(id, file, &on_outputs)?;
    state.set_scanout_blob(command)
}

/// A texture whose own memory cannot be shown is copied at each flush.
pub(super) fn show_texture(
    state: &mut State,
    command: &SetScanout,
    reply: Reply,
) -> Result<Response, CommandError> {
    let on_outputs = on_outputs(state);
    let id = command.resource_id.get();
    let layout = TextureLayout::read_from_bytes(&reply.data);
    let shown = match (reply.file, layout) {
        (Some(file), Ok(layout)) => exported_layout(&layout)
            .and_then(|layout| state.resources.show_texture(id, file, layout, &on_outputs)),
        _ => Err(CommandError::Renderer),
    };
    if let Err(error) = shown {
        tracing::debug!(%error, id, "a texture is copied for outputs");
        state.resources.host_mut(id)?.no_export = true;
    }
    state.set_scanout_2d(command)
}

fn exported_layout(layout: &TextureLayout) -> Result<ExportedLayout, CommandError> {
    Ok(ExportedLayout {
        format: Format::from_fourcc(layout.fourcc).ok_or(CommandError::Renderer)?,
        stride: layout.stride,
        offset: layout.offset,
    })
}
