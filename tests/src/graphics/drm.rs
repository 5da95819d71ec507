//! The virtio GPU's driver in the guest, by its own calls (Linux `include/uapi/drm/virtgpu_drm.h`,
//! `drm_mode.h`).

use std::{fs::File, os::fd::AsRawFd, ptr};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::{Context, Failure, Result};

const MAP: u8 = 0x41;
const EXECBUFFER: u8 = 0x42;
const RESOURCE_CREATE: u8 = 0x44;
const WAIT: u8 = 0x48;
const RESOURCE_CREATE_BLOB: u8 = 0x4a;
const CONTEXT_INIT: u8 = 0x4b;
const GEM_CLOSE: u8 = 0x09;
const MODE_GETRESOURCES: u8 = 0xa0;
const MODE_SETCRTC: u8 = 0xa2;
const MODE_GETCONNECTOR: u8 = 0xa7;
const MODE_DIRTYFB: u8 = 0xb1;
const MODE_ADDFB2: u8 = 0xb8;

const CONTEXT_PARAM_CAPSET_ID: u64 = 1;
const BLOB_MEM_HOST3D: u32 = 2;
const BLOB_FLAG_USE_MAPPABLE: u32 = 1;
const CAPSET_VIRGL2: u64 = 2;
const CAPSET_VENUS: u64 = 4;
const PAGE: u64 = 4096;

#[derive(Default)]
#[repr(C)]
struct Map {
    offset: u64,
    handle: u32,
    pad: u32,
}

#[derive(Default)]
#[repr(C)]
struct CreateBlob {
    blob_mem: u32,
    blob_flags: u32,
    bo_handle: u32,
    res_handle: u32,
    size: u64,
    pad: u32,
    cmd_size: u32,
    cmd: u64,
    blob_id: u64,
}

#[repr(C)]
struct ContextInit {
    num_params: u32,
    pad: u32,
    params: u64,
}

#[derive(Default)]
#[repr(C)]
struct ExecBuffer {
    flags: u32,
    size: u32,
    command: u64,
    bo_handles: u64,
    num_bo_handles: u32,
    fence_fd: i32,
    ring_idx: u32,
    syncobj_stride: u32,
    num_in_syncobjs: u32,
    num_out_syncobjs: u32,
    in_syncobjs: u64,
    out_syncobjs: u64,
}

#[derive(Default)]
#[repr(C)]
struct CreateResource {
    target: u32,
    format: u32,
    bind: u32,
    width: u32,
    height: u32,
    depth: u32,
    array_size: u32,
    last_level: u32,
    nr_samples: u32,
    flags: u32,
    bo_handle: u32,
    res_handle: u32,
    size: u32,
    stride: u32,
}

#[derive(Default)]
#[repr(C)]
struct CardResources {
    fbs: u64,
    crtcs: u64,
    connectors: u64,
    encoders: u64,
    count_fbs: u32,
    count_crtcs: u32,
    count_connectors: u32,
    count_encoders: u32,
    limits: [u32; 4],
}

/// `struct drm_mode_modeinfo`, of which only the size is looked at.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Mode {
    clock: u32,
    horizontal: [u16; 5],
    vertical: [u16; 5],
    rest: [u32; 3],
    name: [u32; 8],
}

#[derive(Default)]
#[repr(C)]
struct Connector {
    encoders: u64,
    modes: u64,
    props: u64,
    prop_values: u64,
    count_modes: u32,
    count_props: u32,
    count_encoders: u32,
    encoder_id: u32,
    connector_id: u32,
    more: [u32; 7],
}

#[derive(Default)]
#[repr(C)]
struct Crtc {
    connectors: u64,
    count_connectors: u32,
    crtc_id: u32,
    fb_id: u32,
    x: u32,
    y: u32,
    gamma_size: u32,
    mode_valid: u32,
    mode: Mode,
}

#[derive(Default)]
#[repr(C)]
struct Framebuffer {
    fb_id: u32,
    width: u32,
    height: u32,
    pixel_format: u32,
    flags: u32,
    handles: [u32; 4],
    pitches: [u32; 4],
    offsets: [u32; 4],
    modifiers: [u64; 4],
}

#[derive(Default)]
#[repr(C)]
struct Dirty {
    fb_id: u32,
    flags: u32,
    color: u32,
    num_clips: u32,
    clips: u64,
}

/// The virtio GPU, with a context of this program's.
pub struct Gpu(File);

impl Gpu {
    fn open() -> Result<Self> {
        // The only one in a guest.
        let path = "/dev/dri/card0";
        let file = File::options().read(true).write(true).open(path);
        Ok(Self(file.context(format!("cannot open {path}"))?))
    }

    fn with_context(capset: u64) -> Result<Self> {
        let gpu = Self::open()?;
        let params = [CONTEXT_PARAM_CAPSET_ID, capset];
        let mut init = ContextInit {
            num_params: 1,
            pad: 0,
            params: params.as_ptr() as u64,
        };
        gpu.call(CONTEXT_INIT, &mut init)
            .context("cannot make a context")?;
        Ok(gpu)
    }

    /// With a context for Vulkan, whose blobs can be made without a command stream.
    pub fn with_venus() -> Result<Self> {
        Self::with_context(CAPSET_VENUS)
    }

    fn call<T>(&self, number: u8, argument: &mut T) -> std::io::Result<()> {
        let request = 3 << 30 | (size_of::<T>() as u64) << 16 | 0x64 << 8 | u64::from(number);
        // SAFETY: the structures are the kernel's, and what they point to lives meanwhile.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, argument) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    /// A blob of the renderer's of so many bytes, which the driver shows at once.
    pub fn blob(&self, size: u64) -> Result<Blob<'_>> {
        let mut create = CreateBlob {
            blob_mem: BLOB_MEM_HOST3D,
            blob_flags: BLOB_FLAG_USE_MAPPABLE,
            size,
            ..Default::default()
        };
        self.call(RESOURCE_CREATE_BLOB, &mut create)
            .context("cannot make a blob")?;
        Ok(Blob {
            gpu: self,
            handle: create.bo_handle,
            size,
        })
    }
}

/// A blob; gone when dropped.
pub struct Blob<'a> {
    gpu: &'a Gpu,
    handle: u32,
    size: u64,
}

impl Blob<'_> {
    /// Does something with its first word.
    fn with_word<R>(&self, act: impl FnOnce(*mut u64) -> R) -> Result<R> {
        let mut map = Map {
            handle: self.handle,
            ..Default::default()
        };
        self.gpu
            .call(MAP, &mut map)
            .context("cannot find a blob's place")?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let len = self.size as usize;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                access,
                MapFlags::SHARED,
                &self.gpu.0,
                map.offset,
            )
        };
        let at = at.context("cannot map a blob")?;
        let result = act(at.cast());
        // SAFETY: the mapping is this function's.
        let _ = unsafe { munmap(at, len) };
        Ok(result)
    }

    /// Writes its first word.
    pub fn write(&self, word: u64) -> Result<()> {
        // SAFETY: within the mapping, and aligned.
        self.with_word(|at| unsafe { at.write_volatile(word) })
    }

    /// Reads its first word.
    pub fn read(&self) -> Result<u64> {
        // SAFETY: within the mapping, and aligned.
        self.with_word(|at| unsafe { at.read_volatile() })
    }
}

impl Drop for Blob<'_> {
    fn drop(&mut self) {
        let mut close = [self.handle, 0];
        let _ = self.gpu.call(GEM_CLOSE, &mut close);
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
    let start = std::time::Instant::now();
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
const XR24: u32 = u32::from_le_bytes(*b"XR24");
/// `virgl_protocol.h`: commands, and the kind of object that a surface is.
const CCMD_CREATE_OBJECT: u32 = 1;
const CCMD_SET_FRAMEBUFFER_STATE: u32 = 5;
const CCMD_CLEAR: u32 = 7;
const OBJECT_SURFACE: u32 = 8;
const PIPE_CLEAR_COLOR0: u32 = 4;

/// Has the host fill a screen with a colour, and shows it until standard input ends.
pub fn show([red, green, blue]: [f32; 3]) -> Result<String> {
    let gpu = Gpu::with_context(CAPSET_VIRGL2)?;
    let (crtc, connector, mode) = gpu.output()?;
    let (width, height) = (mode.horizontal[0].into(), mode.vertical[0].into());
    let mut resource = CreateResource {
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
    gpu.call(RESOURCE_CREATE, &mut resource)
        .context("cannot make a texture")?;
    let head = |command, object, len: u32| command | object << 8 | len << 16;
    let colour = [red, green, blue, 1.0].map(f32::to_bits);
    let mut stream = vec![
        head(CCMD_CREATE_OBJECT, OBJECT_SURFACE, 5),
        1,
        resource.res_handle,
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
    stream.extend(colour);
    stream.extend([0, 0, 0]);
    let handles = [resource.bo_handle];
    let mut submit = ExecBuffer {
        size: stream.len() as u32 * 4,
        command: stream.as_ptr() as u64,
        bo_handles: handles.as_ptr() as u64,
        num_bo_handles: 1,
        ..Default::default()
    };
    gpu.call(EXECBUFFER, &mut submit)
        .context("cannot submit commands")?;
    gpu.call(WAIT, &mut [resource.bo_handle, 0])
        .context("cannot wait for the host")?;
    let mut framebuffer = Framebuffer {
        width,
        height,
        pixel_format: XR24,
        handles: [resource.bo_handle, 0, 0, 0],
        pitches: [width * 4, 0, 0, 0],
        ..Default::default()
    };
    gpu.call(MODE_ADDFB2, &mut framebuffer)
        .context("cannot make a framebuffer")?;
    let connectors = [connector];
    let mut set = Crtc {
        connectors: connectors.as_ptr() as u64,
        count_connectors: 1,
        crtc_id: crtc,
        fb_id: framebuffer.fb_id,
        mode_valid: 1,
        mode,
        ..Default::default()
    };
    gpu.call(MODE_SETCRTC, &mut set)
        .context("cannot show a framebuffer")?;
    let mut dirty = Dirty {
        fb_id: framebuffer.fb_id,
        ..Default::default()
    };
    gpu.call(MODE_DIRTYFB, &mut dirty)
        .context("cannot flush a framebuffer")?;
    println!("agent: showing {width}x{height}");
    let _ = std::io::stdin().read_line(&mut String::new());
    Ok("shown".into())
}

impl Gpu {
    /// Crtc, connector and mode of the first output.
    fn output(&self) -> Result<(u32, u32, Mode)> {
        let (mut crtcs, mut connectors) = ([0_u32; 32], [0_u32; 32]);
        let mut resources = CardResources {
            crtcs: crtcs.as_mut_ptr() as u64,
            connectors: connectors.as_mut_ptr() as u64,
            count_crtcs: crtcs.len() as u32,
            count_connectors: connectors.len() as u32,
            ..Default::default()
        };
        self.call(MODE_GETRESOURCES, &mut resources)
            .context("cannot list outputs")?;
        // Asked twice: the first time it finds out how many there are.
        let mut modes = [Mode::default(); 64];
        let mut connector = Connector {
            connector_id: connectors[0],
            ..Default::default()
        };
        self.call(MODE_GETCONNECTOR, &mut connector)
            .context("cannot look at an output")?;
        let mut connector = Connector {
            connector_id: connectors[0],
            modes: modes.as_mut_ptr() as u64,
            count_modes: modes.len() as u32,
            ..Default::default()
        };
        self.call(MODE_GETCONNECTOR, &mut connector)
            .context("cannot look at an output's modes")?;
        if connector.count_modes == 0 {
            return Err(Failure("the output has no modes".into()));
        }
        Ok((crtcs[0], connectors[0], modes[0]))
    }
}
