//! virglrenderer, found at run time. Everything of its C interface is below this module.

mod callbacks;
mod ffi;

use std::{
    ffi::{c_int, c_void},
    fs::File,
    os::fd::{FromRawFd, OwnedFd},
    ptr,
};

use fanlight_devices::virtio::gpu::{
    protocol::{
        CtxCreate, ResourceCreate3d, ResourceCreateBlob, TransferHost3d,
        VIRTIO_GPU_BLOB_FLAG_USE_MAPPABLE,
    },
    render::wire::TextureLayout,
};
use libc::iovec;

pub use callbacks::Fences;
use callbacks::{log, write_context_fence, write_fence};
use ffi::*;

/// The library's name, in Debian from `libvirglrenderer1`.
const NAME: &str = "libvirglrenderer.so.1";

/// The library refused a call, or its arguments are out of range.
#[derive(Clone, Copy, Debug)]
pub struct Refused;

fn done(result: c_int) -> Result<(), Refused> {
    if result == 0 { Ok(()) } else { Err(Refused) }
}

/// The library, initialized: one in a process, used by one thread.
pub struct Library {
    functions: Functions,
    // Never unloaded: its state belongs to the process.
    _library: &'static libloading::Library,
}

/// Why the library cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// It is missing, or lacks a function.
    #[error(
        "{NAME} cannot be loaded: install virglrenderer 1.1 or later, in Debian libvirglrenderer1"
    )]
    Load(#[from] libloading::Error),
    /// Its initialization failed.
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
        // SAFETY: the library's constructors touch only its own data.
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

    /// Highest version and longest content of a capability set. Both are 0 if there is no such set.
    pub fn capset_info(&self, id: u32) -> (u32, u32) {
        let (mut version, mut size) = (0, 0);
        // SAFETY: both are written.
        unsafe { (self.functions.get_cap_set)(id, &mut version, &mut size) };
        (version, size)
    }

    /// The content of a capability set, which must exist.
    pub fn capset(&self, id: u32, version: u32) -> Vec<u8> {
        let (_, size) = self.capset_info(id);
        // In words: the library writes a structure, which must be aligned.
        let mut content = vec![0_u64; (size as usize).div_ceil(8)];
        // SAFETY: no version is longer than the size that the library returned.
        unsafe { (self.functions.fill_caps)(id, version, content.as_mut_ptr().cast()) };
        let bytes = content.iter().flat_map(|word| word.to_ne_bytes());
        bytes.take(size as usize).collect()
    }

    /// Creates a context.
    pub fn create_context(&self, id: u32, command: &CtxCreate) -> Result<(), Refused> {
        let len = command.nlen.get().min(command.debug_name.len() as u32);
        let name = command.debug_name.as_ptr().cast();
        let flags = command.context_init.get();
        // SAFETY: the name has `len` bytes, and the library copies it.
        done(unsafe {
            match flags {
                0 => (self.functions.context_create)(id, len, name),
                _ => (self.functions.context_create_with_flags)(id, flags, len, name),
            }
        })
    }

    /// Destroys a context.
    pub fn destroy_context(&self, id: u32) {
        // SAFETY: any number is looked up.
        unsafe { (self.functions.context_destroy)(id) };
    }

    /// Runs a command stream of the guest, of `words` words of 32 bits.
    ///
    /// The library reads it more than once, so the guest must not be able to change it.
    pub fn submit(&self, context: u32, stream: &mut [u64], words: u32) -> Result<(), Refused> {
        if words as usize > stream.len() * 2 {
            return Err(Refused);
        }
        let stream = stream.as_mut_ptr().cast();
        let (context, words) = (context.cast_signed(), words.cast_signed());
        // SAFETY: the stream has `words` words, aligned, for the time of the call.
        done(unsafe { (self.functions.submit_cmd)(stream, context, words) })
    }

    /// Makes a resource visible to a context.
    pub fn attach_to_context(&self, context: u32, resource: u32) {
        let (context, resource) = (context.cast_signed(), resource.cast_signed());
        // SAFETY: any numbers are looked up.
        unsafe { (self.functions.ctx_attach)(context, resource) };
    }

    /// Hides a resource from a context.
    pub fn detach_from_context(&self, context: u32, resource: u32) {
        let (context, resource) = (context.cast_signed(), resource.cast_signed());
        // SAFETY: any numbers are looked up.
        unsafe { (self.functions.ctx_detach)(context, resource) };
    }

    /// Creates a resource with a format and a size.
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

    /// Creates a blob resource.
    pub fn create_blob(&self, context: u32, command: &ResourceCreateBlob) -> Result<(), Refused> {
        let mut blob_flags = command.blob_flags.get();
        if command.blob_id.get() == 0 {
            // A blob without a driver object is a memory file. It can be shared always; the library refuses the
            // flags that ask for it.
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

    /// Destroys a resource.
    pub fn unref(&self, resource: u32) {
        // SAFETY: any number is looked up. The caller has detached guest memory.
        unsafe { (self.functions.resource_unref)(resource) };
    }

    /// Attaches guest memory to a resource.
    ///
    /// # Safety
    /// `memory` and what it points to must stay valid until [`Self::detach_memory`].
    pub unsafe fn attach_memory(&self, resource: u32, memory: &mut [iovec]) -> Result<(), Refused> {
        let count = c_int::try_from(memory.len()).map_err(|_| Refused)?;
        let resource = resource.cast_signed();
        // SAFETY: the caller guarantees that the memory stays valid.
        done(unsafe { (self.functions.attach_iov)(resource, memory.as_mut_ptr(), count) })
    }

    /// Detaches guest memory from a resource.
    pub fn detach_memory(&self, resource: u32) {
        let (mut memory, mut count) = (ptr::null_mut(), 0);
        // SAFETY: both arguments are written; the list still belongs to the caller of `attach_memory`.
        unsafe { (self.functions.detach_iov)(resource.cast_signed(), &mut memory, &mut count) };
    }

    /// Copies between a resource and its guest memory, to the host or back.
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
    /// `memory` must be writable, and nothing else may use it during the call.
    pub unsafe fn read_pixels(
        &self,
        resource: u32,
        [x, y, width, height]: [u32; 4],
        stride: u32,
        offset: u64,
        mut memory: iovec,
    ) -> Result<(), Refused> {
        let mut part = VirglBox([x, y, 0, width, height, 1]);
        // SAFETY: the library checks the rectangle against `memory`, for which the caller vouches.
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

    /// The memory of a blob as a file, and its cache attributes (`VIRTIO_GPU_MAP_CACHE_*`).
    pub fn export(&self, resource: u32) -> Result<(File, u32), Refused> {
        let (mut kind, mut fd, mut info) = (0, -1, 0);
        // SAFETY: the arguments are written.
        done(unsafe { (self.functions.get_map_info)(resource, &mut info) })?;
        // SAFETY: as above.
        done(unsafe { (self.functions.export_blob)(resource, &mut kind, &mut fd) })?;
        if fd < 0 {
            return Err(Refused);
        }
        // SAFETY: the library returns a new descriptor, which the caller owns.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        if matches!(kind, BLOB_FD_TYPE_DMABUF | BLOB_FD_TYPE_SHM) {
            Ok((file, info & MAP_CACHE_MASK))
        } else {
            Err(Refused)
        }
    }

    /// The memory of a texture as a dma-buf, if it is linear and starts with the first row.
    pub fn export_texture(&self, resource: u32) -> Result<(File, TextureLayout), Refused> {
        let mut info = InfoExt::default();
        // SAFETY: the structure is written. It has room for fields of later versions.
        done(unsafe { (self.functions.get_info_ext)(resource.cast_signed(), &mut info) })?;
        if !info.is_linear() {
            return Err(Refused);
        }
        let base = &info.base;
        let (mut fd, mut stride, mut offset) = (-1, 0, 0);
        let texture = base.tex_id;
        // SAFETY: the arguments are written.
        done(unsafe {
            (self.functions.get_fd_for_texture)(texture, &mut fd, &mut stride, &mut offset)
        })?;
        if fd < 0 {
            return Err(Refused);
        }
        // SAFETY: the library returns a new descriptor, which the caller owns.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let layout = TextureLayout {
            fourcc: base.drm_fourcc,
            stride: u32::try_from(stride).map_err(|_| Refused)?,
            offset: u32::try_from(offset).map_err(|_| Refused)?,
        };
        Ok((file, layout))
    }

    /// Requests a fence of the device.
    pub fn fence(&self, number: u32) -> Result<(), Refused> {
        // SAFETY: any number is valid.
        done(unsafe { (self.functions.create_fence)(number.cast_signed(), 0) })
    }

    /// Requests a fence of a context's ring.
    pub fn ring_fence(&self, context: u32, ring: u32, number: u32) -> Result<(), Refused> {
        let (flags, number) = (FENCE_FLAG_MERGEABLE, number.into());
        // SAFETY: any numbers are looked up.
        done(unsafe { (self.functions.context_create_fence)(context, flags, ring, number) })
    }
}
