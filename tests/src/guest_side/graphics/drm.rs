//! 3D through ioctls of the guest's driver, without Mesa.

use crate::{
    Context, Failure, Result,
    common::pci::Mmio,
    guest_side::drm::{
        Card, Device, ModeInfo, Shown, VirtgpuContextInit, VirtgpuExecbuffer, VirtgpuMap,
        VirtgpuResourceCreate, VirtgpuResourceCreateBlob, VirtgpuWait, address,
    },
};

const CONTEXT_PARAM_CAPSET_ID: u64 = 1;
const BLOB_MEM_HOST3D: u32 = 2;
const BLOB_FLAG_USE_MAPPABLE: u32 = 1;
const BLOB_FLAG_USE_SHAREABLE: u32 = 2;
const CAPSET_VIRGL2: u64 = 2;
const CAPSET_VENUS: u64 = 4;
pub(super) const PAGE: u64 = 4096;

/// Opens the virtio GPU and creates a context.
fn with_context(capset: u64) -> Result<Device> {
    let device = Device::open()?;
    let mut params = [CONTEXT_PARAM_CAPSET_ID, capset];
    let mut init = VirtgpuContextInit {
        num_params: 1,
        pad: 0,
        params: address(&mut params),
    };
    // SAFETY: there is one parameter, as the number says.
    unsafe { device.call(&mut init) }.context("cannot make a context")?;
    Ok(device)
}

/// The same for Vulkan, whose contexts create blobs without a command stream.
pub(super) fn with_venus() -> Result<Device> {
    with_context(CAPSET_VENUS)
}

/// A renderer blob, freed when dropped.
pub(super) struct Blob<'a> {
    device: &'a Device,
    handle: u32,
    size: u64,
}

impl<'a> Blob<'a> {
    /// Creates a blob of `size` bytes, which the driver maps at once.
    pub(super) fn new(device: &'a Device, size: u64) -> Result<Self> {
        Self::with_flags(device, size, BLOB_FLAG_USE_MAPPABLE)
    }

    /// Creates a blob that other devices can use.
    pub(super) fn shareable(device: &'a Device, size: u64) -> Result<Self> {
        let flags = BLOB_FLAG_USE_MAPPABLE | BLOB_FLAG_USE_SHAREABLE;
        Self::with_flags(device, size, flags)
    }

    fn with_flags(device: &'a Device, size: u64, blob_flags: u32) -> Result<Self> {
        let mut create = VirtgpuResourceCreateBlob {
            blob_mem: BLOB_MEM_HOST3D,
            blob_flags,
            size,
            ..Default::default()
        };
        // SAFETY: the argument refers to no command.
        unsafe { device.call(&mut create) }.context("cannot make a blob")?;
        Ok(Blob {
            device,
            handle: create.bo_handle,
            size,
        })
    }

    pub(super) fn map(&self) -> Result<Mmio> {
        let mut map = VirtgpuMap {
            handle: self.handle,
            ..Default::default()
        };
        // SAFETY: the structure is the whole of the argument.
        unsafe { self.device.call(&mut map) }.context("cannot find a blob's place")?;
        Mmio::new(self.device.file(), map.offset, self.size).context("cannot map a blob")
    }

    /// Maps the memory through a dma-buf. The mapping stays valid after the blob and the device are gone.
    pub(super) fn map_shared(&self) -> Result<Mmio> {
        let dmabuf = self.device.export(self.handle)?;
        Mmio::new(&dmabuf, 0, self.size).context("cannot map a blob's dma-buf")
    }

    /// Writes the first word.
    pub(super) fn write(&self, word: u64) -> Result<()> {
        self.map()?.write(0, word);
        Ok(())
    }

    /// Reads the first word.
    pub(super) fn read(&self) -> Result<u64> {
        Ok(self.map()?.read(0))
    }
}

impl Drop for Blob<'_> {
    fn drop(&mut self) {
        let _ = self.device.close(self.handle);
    }
}

const PIPE_TEXTURE_2D: u32 = 2;
const B8G8R8X8: u32 = 2;
const BIND_RENDER_TARGET: u32 = 1 << 1;
const BIND_SCANOUT: u32 = 1 << 18;
/// `virgl_protocol.h`: commands, and the object type of a surface.
const CCMD_CREATE_OBJECT: u32 = 1;
const CCMD_SET_FRAMEBUFFER_STATE: u32 = 5;
const CCMD_CLEAR: u32 = 7;
const OBJECT_SURFACE: u32 = 8;
const PIPE_CLEAR_COLOR0: u32 = 4;

/// Has the host fill a texture with a colour, and shows it until a line comes. Then fills it with the next colour
/// without a flush, until another line comes.
pub fn show(colours: [[f32; 3]; 2]) -> Result<String> {
    let card = Card::of(with_context(CAPSET_VIRGL2)?)?;
    let mode = preferred(&card)?;
    let (width, height) = mode.size();
    let mut texture = VirtgpuResourceCreate {
        target: PIPE_TEXTURE_2D,
        format: B8G8R8X8,
        bind: BIND_RENDER_TARGET | BIND_SCANOUT,
        width,
        height,
        depth: 1,
        array_size: 1,
        size: width * height * 4,
        stride: width * 4,
        ..Default::default()
    };
    // SAFETY: the structure is the whole of the argument.
    unsafe { card.device().call(&mut texture) }.context("cannot make a texture")?;
    fill(card.device(), &texture, colours[0])?;
    let _shown = present(&card, texture.bo_handle, mode)?;
    wait_for_line();
    fill(card.device(), &texture, colours[1])?;
    println!("agent: drawn again");
    wait_for_line();
    Ok("shown".into())
}

/// Draws a colour (0x00RRGGBB) into a renderer blob, and shows it until standard input ends.
pub fn show_blob(colour: u32) -> Result<String> {
    let card = Card::of(with_venus()?)?;
    let mode = preferred(&card)?;
    let (width, height) = mode.size();
    let size = u64::from(width) * u64::from(height) * 4;
    let blob = Blob::new(card.device(), size.next_multiple_of(PAGE))?;
    let memory = blob.map()?;
    for at in (0..size as usize).step_by(4) {
        memory.write(at, colour);
    }
    let _shown = present(&card, blob.handle, mode)?;
    wait_for_line();
    Ok("shown".into())
}

fn preferred(card: &Card) -> Result<ModeInfo> {
    let mode = card.modes()?.into_iter().next();
    mode.ok_or_else(|| Failure("the output has no modes".into()))
}

/// Shows a buffer in a mode of its size.
fn present(card: &Card, handle: u32, mode: ModeInfo) -> Result<Shown> {
    let (width, height) = mode.size();
    let shown = card.framebuffer(handle, width, height)?;
    card.set(&shown, mode)?;
    card.dirty(&shown)?;
    println!("agent: showing {width}x{height}");
    Ok(shown)
}

fn wait_for_line() {
    let _ = std::io::stdin().read_line(&mut String::new());
}

/// Has the host fill a texture, and waits for the end.
fn fill(
    device: &Device,
    texture: &VirtgpuResourceCreate,
    [red, green, blue]: [f32; 3],
) -> Result<()> {
    let head = |command, object, len: u32| command | object << 8 | len << 16;
    let mut stream = vec![
        head(CCMD_CREATE_OBJECT, OBJECT_SURFACE, 5),
        1,
        texture.res_handle,
        B8G8R8X8,
        0,
        0,
        head(CCMD_SET_FRAMEBUFFER_STATE, 0, 3),
        1,
        0,
        1,
        head(CCMD_CLEAR, 0, 8),
        PIPE_CLEAR_COLOR0,
    ];
    stream.extend([red, green, blue, 1.0].map(f32::to_bits));
    stream.extend([0, 0, 0]);
    let mut handles = [texture.bo_handle];
    let mut submit = VirtgpuExecbuffer {
        size: stream.len() as u32 * 4,
        command: address(&mut stream),
        bo_handles: address(&mut handles),
        num_bo_handles: 1,
        ..Default::default()
    };
    // SAFETY: the stream has the given size, and there is one handle.
    unsafe { device.call(&mut submit) }.context("cannot submit commands")?;
    let mut wait = VirtgpuWait {
        handle: texture.bo_handle,
        flags: 0,
    };
    // SAFETY: the structure is the whole of the argument.
    unsafe { device.call(&mut wait) }.context("cannot wait for the host")
}
