//! `virglrenderer.h`, 1.1 and later: constants, structures and functions.

use std::ffi::{c_char, c_int, c_void};

use fanlight_devices::virtio::gpu::{DRM_FORMAT_MOD_LINEAR, protocol::Box3d};
use libc::iovec;

pub const USE_EGL: c_int = 1 << 0;
pub const THREAD_SYNC: c_int = 1 << 1;
pub const USE_SURFACELESS: c_int = 1 << 3;
pub const USE_EXTERNAL_BLOB: c_int = 1 << 5;
pub const VENUS: c_int = 1 << 6;
pub const NO_VIRGL: c_int = 1 << 7;
pub const ASYNC_FENCE_CB: c_int = 1 << 8;
pub const RENDER_SERVER: c_int = 1 << 9;

pub const FENCE_FLAG_MERGEABLE: u32 = 1;
pub const BLOB_FD_TYPE_DMABUF: u32 = 1;
pub const BLOB_FD_TYPE_SHM: u32 = 3;
pub const MAP_CACHE_MASK: u32 = 0xf;
/// `virgl_log_level_flags`.
pub const LOG_LEVEL_WARNING: c_int = 2;

/// `struct virgl_renderer_callbacks`, version 3.
#[repr(C)]
pub struct Callbacks {
    pub version: c_int,
    pub write_fence: unsafe extern "C" fn(*mut c_void, u32),
    pub create_gl_context: *const c_void,
    pub destroy_gl_context: *const c_void,
    pub make_current: *const c_void,
    pub get_drm_fd: *const c_void,
    pub write_context_fence: unsafe extern "C" fn(*mut c_void, u32, u32, u64),
    pub get_server_fd: *const c_void,
    pub get_egl_display: *const c_void,
}

// SAFETY: it contains function pointers and null pointers only.
unsafe impl Sync for Callbacks {}

/// `struct virgl_renderer_resource_create_args`.
#[repr(C)]
pub struct CreateArgs {
    pub handle: u32,
    pub target: u32,
    pub format: u32,
    pub bind: u32,
    pub width: u32,
    pub height: u32,
    pub depth: u32,
    pub array_size: u32,
    pub last_level: u32,
    pub nr_samples: u32,
    pub flags: u32,
}

/// `VIRGL_RESOURCE_Y_0_TOP`: memory has the rows in the opposite order of transfers.
pub const RESOURCE_Y_0_TOP: u32 = 1;

/// `struct virgl_renderer_resource_info`.
#[repr(C)]
#[derive(Default)]
pub struct Info {
    pub handle: u32,
    pub virgl_format: u32,
    pub width: u32,
    pub height: u32,
    pub depth: u32,
    pub flags: u32,
    pub tex_id: u32,
    pub stride: u32,
    pub drm_fourcc: u32,
    pub fd: c_int,
}

/// `struct virgl_renderer_resource_info_ext`, with room for fields of later versions.
#[repr(C)]
#[derive(Default)]
pub struct InfoExt {
    pub version: c_int,
    pub base: Info,
    pub has_dmabuf_export: u8,
    pub planes: c_int,
    pub modifier: u64,
    pub more: [u64; 16],
}

impl InfoExt {
    /// Whether the texture's memory can be shown as it is: one plane of rows that follow each other, the first one first.
    pub fn is_linear(&self) -> bool {
        self.has_dmabuf_export != 0
            && self.planes == 1
            && self.modifier == DRM_FORMAT_MOD_LINEAR
            && self.base.flags & RESOURCE_Y_0_TOP == 0
    }
}

/// `struct virgl_renderer_resource_create_blob_args`.
#[repr(C)]
pub struct CreateBlobArgs {
    pub res_handle: u32,
    pub ctx_id: u32,
    pub blob_mem: u32,
    pub blob_flags: u32,
    pub blob_id: u64,
    pub size: u64,
    pub iovecs: *const iovec,
    pub num_iovs: u32,
}

/// `struct virgl_box`.
#[repr(C)]
pub struct VirglBox(pub [u32; 6]);

impl From<&Box3d> for VirglBox {
    fn from(from: &Box3d) -> Self {
        Self([from.x, from.y, from.z, from.w, from.h, from.d].map(|n| n.get()))
    }
}

macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// The functions of the library.
        pub struct Functions { $(pub $field: unsafe extern "C" fn($($argument),*) $(-> $result)?,)* }

        /// Names of the functions that the library must have.
        #[cfg(test)]
        const NAMES: &[&str] = &[$($symbol),*];

        impl Functions {
            /// Looks all of them up.
            pub fn find(library: &libloading::Library) -> Result<Self, libloading::Error> {
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

/// `virgl_log_callback_type`.
pub type LogCallback = unsafe extern "C" fn(c_int, *const c_char, *mut c_void);

#[cfg(test)]
mod tests {
    use super::*;

    /// Functions that virglrenderer 1.1 does not have.
    const NEWER: &[&str] = &["virgl_renderer_resource_map_fixed"];

    #[test]
    fn what_is_tiled_or_upside_down_is_not_linear() {
        let linear = || InfoExt {
            has_dmabuf_export: 1,
            planes: 1,
            ..Default::default()
        };
        assert!(linear().is_linear());
        let changes: [fn(&mut InfoExt); 4] = [
            |info| info.has_dmabuf_export = 0,
            |info| info.planes = 2,
            // I915_FORMAT_MOD_X_TILED.
            |info| info.modifier = 1 << 56 | 1,
            |info| info.base.flags = RESOURCE_Y_0_TOP,
        ];
        for change in changes {
            let mut info = linear();
            change(&mut info);
            assert!(!info.is_linear());
        }
    }

    #[test]
    fn nothing_newer_than_1_1_is_needed() {
        assert!(NAMES.contains(&"virgl_renderer_resource_export_blob"));
        assert!(NEWER.iter().all(|name| !NAMES.contains(name)));
    }
}
