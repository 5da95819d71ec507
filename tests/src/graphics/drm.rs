//! 3D by the calls of the guest's driver, without Mesa.

use std::time::Instant;

use crate::{
    Context, Failure, Result,
    drm::{
        Card, Device, VirtgpuContextInit, VirtgpuExecbuffer, VirtgpuMap, VirtgpuResourceCreate,
        VirtgpuResourceCreateBlob, VirtgpuWait, address,
    },
    pci::Mmio,
};

const CONTEXT_PARAM_CAPSET_ID: u64 = 1;
const BLOB_MEM_HOST3D: u32 = 2;
const BLOB_FLAG_USE_MAPPABLE: u32 = 1;
const CAPSET_VIRGL2: u64 = 2;
const CAPSET_VENUS: u64 = 4;
const PAGE: u64 = 4096;

/// The virtio GPU, with a context of this program's.
struct Gpu(Device);

impl Gpu {
    fn with_context(capset: u64) -> Result<Self> {
        let device = Device::open()?;
        let mut params = [CONTEXT_PARAM_CAPSET_ID, capset];
        let mut init = VirtgpuContextInit {
            num_params: 1,
            pad: 0,
            params: address(&mut params),
        };
        // SAFETY: there is one parameter, as the number says.
        unsafe { device.call(&mut init) }.context("cannot make a context")?;
        Ok(Self(device))
    }

    /// With a context for Vulkan, whose blobs can be made without a command stream.
    fn with_venus() -> Result<Self> {
        Self::with_context(CAPSET_VENUS)
    }

    /// A blob of the renderer's of so many bytes, which the driver shows at once.
    fn blob(&self, size: u64) -> Result<Blob<'_>> {
        let mut create = VirtgpuResourceCreateBlob {
            blob_mem: BLOB_MEM_HOST3D,
            blob_flags: BLOB_FLAG_USE_MAPPABLE,
            size,
            ..Default::default()
        };
        // SAFETY: no command is given with it.
        unsafe { self.0.call(&mut create) }.context("cannot make a blob")?;
        Ok(Blob {
            gpu: self,
            handle: create.bo_handle,
            size,
        })
    }
}

/// A blob; gone when dropped.
struct Blob<'a> {
    gpu: &'a Gpu,
    handle: u32,
    size: u64,
}

impl Blob<'_> {
    fn map(&self) -> Result<Mmio> {
        let mut map = VirtgpuMap {
            handle: self.handle,
            ..Default::default()
        };
        // SAFETY: the structure is the whole of the argument.
        unsafe { self.gpu.0.call(&mut map) }.context("cannot find a blob's place")?;
        Mmio::new(self.gpu.0.file(), map.offset, self.size).context("cannot map a blob")
    }

    /// Writes its first word.
    fn write(&self, word: u64) -> Result<()> {
        self.map()?.write(0, word);
        Ok(())
    }

    /// Reads its first word.
    fn read(&self) -> Result<u64> {
        Ok(self.map()?.read(0))
    }
}

impl Drop for Blob<'_> {
    fn drop(&mut self) {
        let _ = self.gpu.0.close(self.handle);
    }
}

/// Makes `count` blobs, which are there at once, writes to each and finds in each what was written there; then
/// makes `pairs` more, one after the other.
pub fn blobs(count: u64, pairs: u64) -> Result<String> {
    let gpu = Gpu::with_venus()?;
    let mut all = Vec::new();
    for number in 0..count {
        let blob = gpu.blob(PAGE)?;
        let before = blob.read()?;
        if before != 0 {
            return Err(Failure(format!("blob {number} holds {before:#x}")));
        }
        blob.write(number + 1)?;
        all.push(blob);
    }
    for (number, blob) in (0..).zip(&all) {
        let word = blob.read()?;
        if word != number + 1 {
            return Err(Failure(format!("blob {number} holds {word:#x}")));
        }
    }
    let start = Instant::now();
    for _ in 0..pairs {
        gpu.blob(PAGE)?;
    }
    let took = start.elapsed().as_micros();
    Ok(format!("{count} blobs and {pairs} pairs in {took} us"))
}

/// Makes blobs until one cannot be used any more; what came of it.
pub fn until_refused() -> Result<String> {
    let gpu = Gpu::with_venus()?;
    println!("agent: going on");
    for made in 0_u64.. {
        let used = gpu.blob(PAGE).and_then(|blob| {
            blob.write(made)?;
            blob.read()
        });
        if let Err(error) = used {
            return Ok(format!("refused after some: {error}"));
        }
    }
    Err(Failure("never refused".into()))
}

const PIPE_TEXTURE_2D: u32 = 2;
const B8G8R8X8: u32 = 2;
const BIND_RENDER_TARGET: u32 = 1 << 1;
const BIND_SCANOUT: u32 = 1 << 18;
/// `virgl_protocol.h`: commands, and the kind of object that a surface is.
const CCMD_CREATE_OBJECT: u32 = 1;
const CCMD_SET_FRAMEBUFFER_STATE: u32 = 5;
const CCMD_CLEAR: u32 = 7;
const OBJECT_SURFACE: u32 = 8;
const PIPE_CLEAR_COLOR0: u32 = 4;

/// Has the host fill a screen with a colour, and shows it until standard input ends.
pub fn show(colour: [f32; 3]) -> Result<String> {
    let card = Card::of(Gpu::with_context(CAPSET_VIRGL2)?.0)?;
    let mode = card.modes()?.into_iter().next();
    let mode = mode.ok_or_else(|| Failure("the output has no modes".into()))?;
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
    fill(card.device(), &texture, colour)?;
    let shown = card.framebuffer(texture.bo_handle, width, height)?;
    card.set(&shown, mode)?;
    card.dirty(&shown)?;
    println!("agent: showing {width}x{height}");
    let _ = std::io::stdin().read_line(&mut String::new());
    Ok("shown".into())
}

/// Has the host fill a texture, and waits until it has.
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
    // SAFETY: the stream has as many bytes as the size says, and there is one handle.
    unsafe { device.call(&mut submit) }.context("cannot submit commands")?;
    let mut wait = VirtgpuWait {
        handle: texture.bo_handle,
        flags: 0,
    };
    // SAFETY: the structure is the whole of the argument.
    unsafe { device.call(&mut wait) }.context("cannot wait for the host")
}
