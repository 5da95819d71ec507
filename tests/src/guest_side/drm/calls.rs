//! Ioctl arguments: the kernel's structures (`include/uapi/drm/drm.h`, `drm_mode.h`, `virtgpu_drm.h`).

/// An ioctl's argument.
///
/// # Safety
/// `REQUEST` is the ioctl that takes this structure.
pub unsafe trait Call {
    /// The ioctl's number, which includes the structure's size.
    const REQUEST: u64;
    /// The ioctl's name, for errors.
    const NAME: &str;
}

macro_rules! calls {
    ($($(#[$doc:meta])* $request:literal $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, Default)]
            #[repr(C)]
            pub struct $name { $(pub $field: $type),* }

            // SAFETY: the structure is the one of the kernel's header; a test compares the sizes.
            unsafe impl Call for $name {
                const REQUEST: u64 = $request;
                const NAME: &str = stringify!($name);
            }
        )*

        #[cfg(test)]
        const SIZES: &[(&str, u64, usize)] =
            &[$((stringify!($name), $request, size_of::<$name>())),*];
    };
}

calls! {
    0xc040_6400 Version { numbers: [i32; 3], name_len: u64, name: u64, rest: [u64; 4] }
    0x4008_6409 GemClose { handle: u32, pad: u32 }
    0xc00c_642d PrimeHandleToFd { handle: u32, flags: u32, fd: i32 }
    0xc00c_642e PrimeFdToHandle { handle: u32, flags: u32, fd: i32 }

    0xc010_6441 VirtgpuMap { offset: u64, handle: u32, pad: u32 }
    0xc040_6442 VirtgpuExecbuffer {
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
    0xc038_6444 VirtgpuResourceCreate {
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
    0xc010_6445 VirtgpuResourceInfo { bo_handle: u32, res_handle: u32, size: u32, blob_mem: u32 }
    /// The area: x, y, z, width, height, depth.
    0xc02c_6447 VirtgpuTransferToHost {
        bo_handle: u32,
        area: [u32; 6],
        level: u32,
        offset: u32,
        stride: u32,
        layer_stride: u32,
    }
    0xc008_6448 VirtgpuWait { handle: u32, flags: u32 }
    0xc030_644a VirtgpuResourceCreateBlob {
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
    0xc010_644b VirtgpuContextInit { num_params: u32, pad: u32, params: u64 }

    0xc040_64a0 GetResources {
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
    0xc068_64a2 SetCrtc {
        connectors: u64,
        count_connectors: u32,
        crtc_id: u32,
        fb_id: u32,
        place: [u32; 2],
        gamma_size: u32,
        mode_valid: u32,
        mode: ModeInfo,
    }
    0xc050_64a7 GetConnector {
        encoders: u64,
        modes: u64,
        props: u64,
        prop_values: u64,
        count_modes: u32,
        count_props: u32,
        count_encoders: u32,
        encoder_id: u32,
        connector_id: u32,
        type_: [u32; 2],
        connection: u32,
        rest: [u32; 4],
    }
    0xc004_64af RemoveFb { fb_id: u32 }
    /// Without clips the whole framebuffer is dirty.
    0xc018_64b1 DirtyFb { fb_id: u32, flags: u32, color: u32, num_clips: u32, clips: u64 }
    0xc020_64b2 CreateDumb {
        height: u32,
        width: u32,
        bpp: u32,
        flags: u32,
        handle: u32,
        pitch: u32,
        size: u64,
    }
    0xc010_64b3 MapDumb { handle: u32, pad: u32, offset: u64 }
    0xc068_64b8 AddFb2 {
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
    0xc024_64bb Cursor2 {
        flags: u32,
        crtc_id: u32,
        place: [i32; 2],
        width: u32,
        height: u32,
        handle: u32,
        hot: [i32; 2],
    }
}

/// `struct drm_mode_modeinfo`: five numbers for each direction, the visible size first.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct ModeInfo {
    pub clock: u32,
    pub horizontal: [u16; 5],
    pub vertical: [u16; 5],
    pub rest: [u32; 3],
    pub name: [u8; 32],
}

impl ModeInfo {
    /// Visible columns and lines.
    pub fn size(&self) -> (u32, u32) {
        (self.horizontal[0].into(), self.vertical[0].into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_as_large_as_the_requests_say() {
        for &(name, request, size) in SIZES {
            assert_eq!(request >> 16 & 0x3fff, size as u64, "{name}");
        }
        assert_eq!(size_of::<ModeInfo>(), 68);
    }
}
