//! virglrenderer's interface (`virglrenderer.h`, 1.1 and later), found at run time: all that is C of it.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    fs::File,
    os::fd::{FromRawFd, OwnedFd},
    ptr,
};

use fanlight_devices::virtio::gpu::{
    DRM_FORMAT_MOD_LINEAR,
    protocol::{
        Box3d, CtxCreate, ResourceCreate3d, ResourceCreateBlob, TransferHost3d,
        VIRTIO_GPU_BLOB_FLAG_USE_MAPPABLE,
    },
    render::wire::TextureLayout,
};
use libc::iovec;

/// Debian's name for what `libvirglrenderer1` has.
const NAME: &str = "libvirglrenderer.so.1";

const USE_EGL: c_int = 1 << 0;
const THREAD_SYNC: c_int = 1 << 1;
const USE_SURFACELESS: c_int = 1 << 3;
const USE_EXTERNAL_BLOB: c_int = 1 << 5;
const VENUS: c_int = 1 << 6;
const NO_VIRGL: c_int = 1 << 7;
const ASYNC_FENCE_CB: c_int = 1 << 8;
const RENDER_SERVER: c_int = 1 << 9;

const FENCE_FLAG_MERGEABLE: u32 = 1;
const BLOB_FD_TYPE_DMABUF: u32 = 1;
const BLOB_FD_TYPE_SHM: u32 = 3;
const MAP_CACHE_MASK: u32 = 0xf;
/// `virgl_log_level_flags`.
const LOG_LEVEL_WARNING: c_int = 2;

/// `struct virgl_renderer_callbacks`, version 3.
#[repr(C)]
struct Callbacks {
    version: c_int,
    write_fence: unsafe extern "C" fn(*mut c_void, u32),
    create_gl_context: *const c_void,
    destroy_gl_context: *const c_void,
    make_current: *const c_void,
    get_drm_fd: *const c_void,
    write_context_fence: unsafe extern "C" fn(*mut c_void, u32, u32, u64),
    get_server_fd: *const c_void,
    get_egl_display: *const c_void,
}

// SAFETY: pointers to functions, and null.
unsafe impl Sync for Callbacks {}

/// `struct virgl_renderer_resource_create_args`.
#[repr(C)]
struct CreateArgs {
    handle: u32,
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
}

/// `VIRGL_RESOURCE_Y_0_TOP`: rows lie in memory in the other order than transfers have them.
const RESOURCE_Y_0_TOP: u32 = 1;

/// `struct virgl_renderer_resource_info`.
#[repr(C)]
#[derive(Default)]
struct Info {
    handle: u32,
    virgl_format: u32,
    width: u32,
    height: u32,
    depth: u32,
    flags: u32,
    tex_id: u32,
    stride: u32,
    drm_fourcc: u32,
    fd: c_int,
}

/// `struct virgl_renderer_resource_info_ext`, with room for what a later library may add.
#[repr(C)]
#[derive(Default)]
struct InfoExt {
    version: c_int,
    base: Info,
    has_dmabuf_export: u8,
    planes: c_int,
    modifier: u64,
    more: [u64; 16],
}

/// `struct virgl_renderer_resource_create_blob_args`.
#[repr(C)]
struct CreateBlobArgs {
    res_handle: u32,
    ctx_id: u32,
    blob_mem: u32,
    blob_flags: u32,
    blob_id: u64,
    size: u64,
    iovecs: *const iovec,
    num_iovs: u32,
}

/// `struct virgl_box`.
#[repr(C)]
struct VirglBox([u32; 6]);

impl From<&Box3d> for VirglBox {
    fn from(from: &Box3d) -> Self {
        Self([from.x, from.y, from.z, from.w, from.h, from.d].map(|n| n.get()))
    }
}

/// Told of fences, on a thread of the library's.
pub trait Fences: Sync {
    /// All up to this one of the device's own order.
    fn passed(&self, number: u32);
    /// All up to this one of a context's ring.
    fn ring_passed(&self, context: u32, ring: u32, number: u32);
}

/// The library did not do it.
#[derive(Clone, Copy, Debug)]
pub struct Refused;

fn done(result: c_int) -> Result<(), Refused> {
    if result == 0 { Ok(()) } else { Err(Refused) }
}

macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        struct Functions { $($field: unsafe extern "C" fn($($argument),*) $(-> $result)?,)* }

        /// What must be there.
        #[cfg(test)]
        const NAMES: &[&str] = &[$($symbol),*];

        impl Functions {
            fn find(library: &libloading::Library) -> Result<Self, libloading::Error> {
                // SAFETY: the header declares functions of these names and types.
                unsafe { Ok(Self { $($field: *library.get(concat!($symbol, "\0").as_bytes())?,)* }) }
            }
        }
    };
}

functions! {
    init = "virgl_renderer_init": fn(*mut c_void, c_int, *const Callbacks) -> c_int;
    get_cap_set = "virgl_renderer_get_cap_set": fn(u32, *mut u32, *mut u32);
    fill_caps = "virgl_renderer_fill_caps": fn(u32, u32, *mut c_void);
    context_create = "virgl_renderer_context_create": fn(u32, u32, *const c_char) -> c_int;
    context_create_with_flags = "virgl_renderer_context_create_with_flags": fn(u32, u32, u32, *const c_char) -> c_int;
    context_destroy = "virgl_renderer_context_destroy": fn(u32);
    submit_cmd = "virgl_renderer_submit_cmd": fn(*mut c_void, c_int, c_int) -> c_int;
    ctx_attach = "virgl_renderer_ctx_attach_resource": fn(c_int, c_int);
    ctx_detach = "virgl_renderer_ctx_detach_resource": fn(c_int, c_int);
    resource_create = "virgl_renderer_resource_create": fn(*mut CreateArgs, *mut iovec, u32) -> c_int;
    resource_create_blob = "virgl_renderer_resource_create_blob": fn(*const CreateBlobArgs) -> c_int;
    resource_unref = "virgl_renderer_resource_unref": fn(u32);
    attach_iov = "virgl_renderer_resource_attach_iov": fn(c_int, *mut iovec, c_int) -> c_int;
    detach_iov = "virgl_renderer_resource_detach_iov": fn(c_int, *mut *mut iovec, *mut c_int);
    transfer_read = "virgl_renderer_transfer_read_iov": fn(u32, u32, u32, u32, u32, *mut VirglBox, u64, *mut iovec, c_int) -> c_int;
    transfer_write = "virgl_renderer_transfer_write_iov": fn(u32, u32, c_int, u32, u32, *mut VirglBox, u64, *mut iovec, u32) -> c_int;
    get_map_info = "virgl_renderer_resource_get_map_info": fn(u32, *mut u32) -> c_int;
    export_blob = "virgl_renderer_resource_export_blob": fn(u32, *mut u32, *mut c_int) -> c_int;
    get_info_ext = "virgl_renderer_resource_get_info_ext": fn(c_int, *mut InfoExt) -> c_int;
    get_fd_for_texture = "virgl_renderer_get_fd_for_texture2": fn(u32, *mut c_int, *mut c_int, *mut c_int) -> c_int;
    create_fence = "virgl_renderer_create_fence": fn(c_int, u32) -> c_int;
    context_create_fence = "virgl_renderer_context_create_fence": fn(u32, u32, u32, u64) -> c_int;
}

type LogCallback = unsafe extern "C" fn(c_int, *const c_char, *mut c_void);

/// The library, initialized. There is one in a process, used by one thread.
pub struct Library {
    functions: Functions,
    // Its state is the process's: it stays to the end.
    _library: &'static libloading::Library,
}

/// Why the library is of no use.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// It is not there, or is another one.
    #[error(
        "{NAME} cannot be loaded: install virglrenderer 1.1 or later, in Debian libvirglrenderer1"
    )]
    Load(#[from] libloading::Error),
    /// It does not work on this host.
    #[error(
        "virglrenderer does not start (error {0}): OpenGL needs EGL without a surface, in Debian libegl1 and \
         libegl-mesa0"
    )]
    Init(c_int),
}

impl Library {
    /// Loads and initializes the library.
    pub fn start(
        virgl: bool,
        venus: bool,
        fences: &'static &'static dyn Fences,
    ) -> Result<Self, LibraryError> {
        static CALLBACKS: Callbacks = Callbacks {
            version: 3,
            write_fence,
            create_gl_context: ptr::null(),
            destroy_gl_context: ptr::null(),
            make_current: ptr::null(),
            get_drm_fd: ptr::null(),
            write_context_fence,
            get_server_fd: ptr::null(),
            get_egl_display: ptr::null(),
        };
        // SAFETY: the library's constructors do nothing beyond its own data.
        let library = Box::leak(Box::new(unsafe { libloading::Library::new(NAME) }?));
        let functions = Functions::find(library)?;
        type SetLog = unsafe extern "C" fn(LogCallback, *mut c_void, *const c_void);
        // SAFETY: the header declares such a function; the callback uses no data.
        unsafe {
            if let Ok(set_log) = library.get::<SetLog>(b"virgl_set_log_callback\0") {
                set_log(log, ptr::null_mut(), ptr::null());
            }
        }
        let mut flags = THREAD_SYNC | ASYNC_FENCE_CB | USE_EXTERNAL_BLOB;
        flags |= if virgl {
            USE_EGL | USE_SURFACELESS
        } else {
            NO_VIRGL
        };
        if venus {
            // Without the server the library crashes.
            flags |= VENUS | RENDER_SERVER;
        }
        let cookie = ptr::from_ref(fences).cast_mut().cast();
        // SAFETY: callbacks and cookie live as long as the process.
        let result = unsafe { (functions.init)(cookie, flags, &CALLBACKS) };
        if result != 0 {
            return Err(LibraryError::Init(result));
        }
        Ok(Self {
            functions,
            _library: library,
        })
    }

    /// Highest version and longest content of a capability set; 0 and 0 of one that there is not.
    pub fn capset_info(&self, id: u32) -> (u32, u32) {
        let (mut version, mut size) = (0, 0);
        // SAFETY: both are written.
        unsafe { (self.functions.get_cap_set)(id, &mut version, &mut size) };
        (version, size)
    }

    /// The content of a capability set, which there must be.
    pub fn capset(&self, id: u32, version: u32) -> Vec<u8> {
        let (_, size) = self.capset_info(id);
        // In words, for it is filled in as a structure.
        let mut content = vec![0_u64; (size as usize).div_ceil(8)];
        // SAFETY: no version is longer than the size that the library tells.
        unsafe { (self.functions.fill_caps)(id, version, content.as_mut_ptr().cast()) };
        let bytes = content.iter().flat_map(|word| word.to_ne_bytes());
        bytes.take(size as usize).collect()
    }

    pub fn create_context(&self, id: u32, command: &CtxCreate) -> Result<(), Refused> {
        let len = command.nlen.get().min(command.debug_name.len() as u32);
        let name = command.debug_name.as_ptr().cast();
        let flags = command.context_init.get();
        // SAFETY: the name has as many bytes as are told, and is copied.
        done(unsafe {
            match flags {
                0 => (self.functions.context_create)(id, len, name),
                _ => (self.functions.context_create_with_flags)(id, flags, len, name),
            }
        })
    }

    pub fn destroy_context(&self, id: u32) {
        // SAFETY: any number is looked up.
        unsafe { (self.functions.context_destroy)(id) };
    }

    /// The stream is the guest's; it must not be memory that the guest can change.
    pub fn submit(&self, context: u32, stream: &mut [u64], words: u32) -> Result<(), Refused> {
        if words as usize > stream.len() * 2 {
            return Err(Refused);
        }
        let stream = stream.as_mut_ptr().cast();
        let (context, words) = (context.cast_signed(), words.cast_signed());
        // SAFETY: there are as many words, aligned, for the time of the call.
        done(unsafe { (self.functions.submit_cmd)(stream, context, words) })
    }

    pub fn attach_to_context(&self, context: u32, resource: u32) {
        let (context, resource) = (context.cast_signed(), resource.cast_signed());
        // SAFETY: any numbers are looked up.
        unsafe { (self.functions.ctx_attach)(context, resource) };
    }

    pub fn detach_from_context(&self, context: u32, resource: u32) {
        let (context, resource) = (context.cast_signed(), resource.cast_signed());
        // SAFETY: any numbers are looked up.
        unsafe { (self.functions.ctx_detach)(context, resource) };
    }

    pub fn create_3d(&self, command: &ResourceCreate3d) -> Result<(), Refused> {
        let mut args = CreateArgs {
            handle: command.resource_id.get(),
            target: command.target.get(),
            format: command.format.get(),
            bind: command.bind.get(),
            width: command.width.get(),
            height: command.height.get(),
            depth: command.depth.get(),
            array_size: command.array_size.get(),
            last_level: command.last_level.get(),
            nr_samples: command.nr_samples.get(),
            flags: command.flags.get(),
        };
        // SAFETY: the arguments are read, and there is no memory yet.
        done(unsafe { (self.functions.resource_create)(&mut args, ptr::null_mut(), 0) })
    }

    pub fn create_blob(&self, context: u32, command: &ResourceCreateBlob) -> Result<(), Refused> {
        let mut blob_flags = command.blob_flags.get();
        if command.blob_id.get() == 0 {
            // Memory of no object of a driver's is a memory file, which anybody can share, though the library takes
            // no flag that says so.
            blob_flags &= VIRTIO_GPU_BLOB_FLAG_USE_MAPPABLE;
        }
        let args = CreateBlobArgs {
            res_handle: command.resource_id.get(),
            ctx_id: context,
            blob_mem: command.blob_mem.get(),
            blob_flags,
            blob_id: command.blob_id.get(),
            size: command.size.get(),
            iovecs: ptr::null(),
            num_iovs: 0,
        };
        // SAFETY: the arguments are read, and there is no guest memory.
        done(unsafe { (self.functions.resource_create_blob)(&args) })
    }

    pub fn unref(&self, resource: u32) {
        // SAFETY: any number is looked up. Memory of the guest's was detached before.
        unsafe { (self.functions.resource_unref)(resource) };
    }

    /// # Safety
    /// `memory` must stay, and what it points to, until it is detached.
    pub unsafe fn attach_memory(&self, resource: u32, memory: &mut [iovec]) -> Result<(), Refused> {
        let count = c_int::try_from(memory.len()).map_err(|_| Refused)?;
        let resource = resource.cast_signed();
        // SAFETY: the caller's promise.
        done(unsafe { (self.functions.attach_iov)(resource, memory.as_mut_ptr(), count) })
    }

    pub fn detach_memory(&self, resource: u32) {
        let (mut memory, mut count) = (ptr::null_mut(), 0);
        // SAFETY: both are written, and are whose they were before.
        unsafe { (self.functions.detach_iov)(resource.cast_signed(), &mut memory, &mut count) };
    }

    /// Between a resource and the memory that is attached to it.
    pub fn transfer(
        &self,
        context: u32,
        command: &TransferHost3d,
        to_host: bool,
    ) -> Result<(), Refused> {
        let mut part = VirglBox::from(&command.box_);
        let (resource, offset) = (command.resource_id.get(), command.offset.get());
        let (level, stride) = (command.level.get(), command.stride.get());
        let layer = command.layer_stride.get();
        // SAFETY: the library checks against the memory that was attached.
        done(unsafe {
            if to_host {
                (self.functions.transfer_write)(
                    resource,
                    context,
                    level.cast_signed(),
                    stride,
                    layer,
                    &mut part,
                    offset,
                    ptr::null_mut(),
                    0,
                )
            } else {
                (self.functions.transfer_read)(
                    resource,
                    context,
                    level,
                    stride,
                    layer,
                    &mut part,
                    offset,
                    ptr::null_mut(),
                    0,
                )
            }
        })
    }

    /// Copies a rectangle (x, y, width, height) of pixels to `memory`, from `offset` on.
    ///
    /// # Safety
    /// Nobody else may use `memory` meanwhile.
    pub unsafe fn read_pixels(
        &self,
        resource: u32,
        [x, y, width, height]: [u32; 4],
        stride: u32,
        offset: u64,
        mut memory: iovec,
    ) -> Result<(), Refused> {
        let mut part = VirglBox([x, y, 0, width, height, 1]);
        // SAFETY: the library checks against `memory`, which is the caller's promise.
        done(unsafe {
            (self.functions.transfer_read)(
                resource,
                0,
                0,
                stride,
                0,
                &mut part,
                offset,
                &mut memory,
                1,
            )
        })
    }

    /// A blob's memory as a file, and how it is cached.
    pub fn export(&self, resource: u32) -> Result<(File, u32), Refused> {
        let (mut kind, mut fd, mut info) = (0, -1, 0);
        // SAFETY: what is pointed to is written.
        done(unsafe { (self.functions.get_map_info)(resource, &mut info) })?;
        // SAFETY: as above.
        done(unsafe { (self.functions.export_blob)(resource, &mut kind, &mut fd) })?;
        if fd < 0 {
            return Err(Refused);
        }
        // SAFETY: the library has just made it, for us.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        if matches!(kind, BLOB_FD_TYPE_DMABUF | BLOB_FD_TYPE_SHM) {
            Ok((file, info & MAP_CACHE_MASK))
        } else {
            Err(Refused)
        }
    }

    /// A texture's memory as a dma-buf, if its rows lie one behind the other in it, the first one first.
    pub fn export_texture(&self, resource: u32) -> Result<(File, TextureLayout), Refused> {
        let mut info = InfoExt::default();
        // SAFETY: the structure is written, and has room for more than is known of it.
        done(unsafe { (self.functions.get_info_ext)(resource.cast_signed(), &mut info) })?;
        let base = &info.base;
        if info.has_dmabuf_export == 0
            || info.planes != 1
            || info.modifier != DRM_FORMAT_MOD_LINEAR
            || base.flags & RESOURCE_Y_0_TOP != 0
        {
            return Err(Refused);
        }
        let (mut fd, mut stride, mut offset) = (-1, 0, 0);
        let texture = base.tex_id;
        // SAFETY: what is pointed to is written.
        done(unsafe {
            (self.functions.get_fd_for_texture)(texture, &mut fd, &mut stride, &mut offset)
        })?;
        if fd < 0 {
            return Err(Refused);
        }
        // SAFETY: the library has just made it, for us.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let layout = TextureLayout {
            fourcc: base.drm_fourcc,
            stride: u32::try_from(stride).map_err(|_| Refused)?,
            offset: u32::try_from(offset).map_err(|_| Refused)?,
        };
        Ok((file, layout))
    }

    pub fn fence(&self, number: u32) -> Result<(), Refused> {
        // SAFETY: any number will do.
        done(unsafe { (self.functions.create_fence)(number.cast_signed(), 0) })
    }

    pub fn ring_fence(&self, context: u32, ring: u32, number: u32) -> Result<(), Refused> {
        let (flags, number) = (FENCE_FLAG_MERGEABLE, number.into());
        // SAFETY: any numbers are looked up.
        done(unsafe { (self.functions.context_create_fence)(context, flags, ring, number) })
    }
}

/// # Safety
/// `cookie` is what [`Library::start`] gave.
unsafe extern "C" fn write_fence(cookie: *mut c_void, number: u32) {
    // SAFETY: it lives as long as the process.
    let fences = unsafe { &*cookie.cast::<&'static dyn Fences>() };
    fences.passed(number);
}

/// # Safety
/// `cookie` is what [`Library::start`] gave.
unsafe extern "C" fn write_context_fence(
    cookie: *mut c_void,
    context: u32,
    ring: u32,
    number: u64,
) {
    // SAFETY: it lives as long as the process.
    let fences = unsafe { &*cookie.cast::<&'static dyn Fences>() };
    fences.ring_passed(context, ring, number as u32);
}

/// Warnings and errors, of which a guest can cause any number.
///
/// # Safety
/// `message` is a string.
unsafe extern "C" fn log(level: c_int, message: *const c_char, _: *mut c_void) {
    use std::sync::atomic::{AtomicU32, Ordering};
    const MOST: u32 = 50;
    static SAID: AtomicU32 = AtomicU32::new(0);
    if level < LOG_LEVEL_WARNING || message.is_null() {
        return;
    }
    let said = SAID.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the library's string, for the time of the call.
    let message = unsafe { CStr::from_ptr(message) }.to_string_lossy();
    if said < MOST {
        tracing::warn!("renderer: {}", message.trim_end());
    } else if said == MOST {
        tracing::warn!("renderer: it says more, which is left out");
    }
    // Does not come round to 0 again in any life of a guest's.
    SAID.fetch_min(MOST + 1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What virglrenderer has had since after 1.1.
    const NEWER: &[&str] = &["virgl_renderer_resource_map_fixed"];

    #[test]
    fn nothing_newer_than_1_1_is_needed() {
        assert!(NAMES.contains(&"virgl_renderer_resource_export_blob"));
        assert!(NEWER.iter().all(|name| !NAMES.contains(name)));
    }
}
