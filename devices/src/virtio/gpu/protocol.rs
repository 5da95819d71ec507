//! Wire structures and constants (Virtio 1.4, 5.7), under the specification's names, and nothing else.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout,
    little_endian::{U32, U64},
};

pub const VIRTIO_GPU_DEVICE_ID: u32 = 16;

/// Feature bits (5.7.3).
pub const VIRTIO_GPU_F_VIRGL: u64 = 1 << 0;
pub const VIRTIO_GPU_F_EDID: u64 = 1 << 1;
pub const VIRTIO_GPU_F_RESOURCE_UUID: u64 = 1 << 2;
pub const VIRTIO_GPU_F_RESOURCE_BLOB: u64 = 1 << 3;
pub const VIRTIO_GPU_F_CONTEXT_INIT: u64 = 1 << 4;
pub const VIRTIO_GPU_F_BLOB_ALIGNMENT: u64 = 1 << 5;

/// Queues (5.7.2).
pub const CONTROL_QUEUE: u16 = 0;
pub const CURSOR_QUEUE: u16 = 1;

pub const VIRTIO_GPU_EVENT_DISPLAY: u32 = 1 << 0;
pub const VIRTIO_GPU_MAX_SCANOUTS: usize = 16;

pub const VIRTIO_GPU_CMD_GET_DISPLAY_INFO: u32 = 0x0100;
pub const VIRTIO_GPU_CMD_RESOURCE_CREATE_2D: u32 = 0x0101;
pub const VIRTIO_GPU_CMD_RESOURCE_UNREF: u32 = 0x0102;
pub const VIRTIO_GPU_CMD_SET_SCANOUT: u32 = 0x0103;
pub const VIRTIO_GPU_CMD_RESOURCE_FLUSH: u32 = 0x0104;
pub const VIRTIO_GPU_CMD_TRANSFER_TO_HOST_2D: u32 = 0x0105;
pub const VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING: u32 = 0x0106;
pub const VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING: u32 = 0x0107;
pub const VIRTIO_GPU_CMD_GET_CAPSET_INFO: u32 = 0x0108;
pub const VIRTIO_GPU_CMD_GET_CAPSET: u32 = 0x0109;
pub const VIRTIO_GPU_CMD_GET_EDID: u32 = 0x010a;
pub const VIRTIO_GPU_CMD_RESOURCE_ASSIGN_UUID: u32 = 0x010b;
pub const VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB: u32 = 0x010c;
pub const VIRTIO_GPU_CMD_SET_SCANOUT_BLOB: u32 = 0x010d;
pub const VIRTIO_GPU_CMD_CTX_CREATE: u32 = 0x0200;
pub const VIRTIO_GPU_CMD_CTX_DESTROY: u32 = 0x0201;
pub const VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE: u32 = 0x0202;
pub const VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE: u32 = 0x0203;
pub const VIRTIO_GPU_CMD_RESOURCE_CREATE_3D: u32 = 0x0204;
pub const VIRTIO_GPU_CMD_TRANSFER_TO_HOST_3D: u32 = 0x0205;
pub const VIRTIO_GPU_CMD_TRANSFER_FROM_HOST_3D: u32 = 0x0206;
pub const VIRTIO_GPU_CMD_SUBMIT_3D: u32 = 0x0207;
pub const VIRTIO_GPU_CMD_RESOURCE_MAP_BLOB: u32 = 0x0208;
pub const VIRTIO_GPU_CMD_RESOURCE_UNMAP_BLOB: u32 = 0x0209;
pub const VIRTIO_GPU_CMD_UPDATE_CURSOR: u32 = 0x0300;
pub const VIRTIO_GPU_CMD_MOVE_CURSOR: u32 = 0x0301;

pub const VIRTIO_GPU_RESP_OK_NODATA: u32 = 0x1100;
pub const VIRTIO_GPU_RESP_OK_DISPLAY_INFO: u32 = 0x1101;
pub const VIRTIO_GPU_RESP_OK_CAPSET_INFO: u32 = 0x1102;
pub const VIRTIO_GPU_RESP_OK_CAPSET: u32 = 0x1103;
pub const VIRTIO_GPU_RESP_OK_EDID: u32 = 0x1104;
pub const VIRTIO_GPU_RESP_OK_RESOURCE_UUID: u32 = 0x1105;
pub const VIRTIO_GPU_RESP_OK_MAP_INFO: u32 = 0x1106;
pub const VIRTIO_GPU_RESP_ERR_UNSPEC: u32 = 0x1200;
pub const VIRTIO_GPU_RESP_ERR_OUT_OF_MEMORY: u32 = 0x1201;
pub const VIRTIO_GPU_RESP_ERR_INVALID_SCANOUT_ID: u32 = 0x1202;
pub const VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID: u32 = 0x1203;
pub const VIRTIO_GPU_RESP_ERR_INVALID_CONTEXT_ID: u32 = 0x1204;
pub const VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER: u32 = 0x1205;

pub const VIRTIO_GPU_FLAG_FENCE: u32 = 1 << 0;
pub const VIRTIO_GPU_FLAG_INFO_RING_IDX: u32 = 1 << 1;
/// Rings of a context.
pub const VIRTIO_GPU_MAX_RINGS: u8 = 64;

/// Capability sets (5.7.6.8).
pub const VIRTIO_GPU_CAPSET_VIRGL: u32 = 1;
pub const VIRTIO_GPU_CAPSET_VIRGL2: u32 = 2;
pub const VIRTIO_GPU_CAPSET_VENUS: u32 = 4;
/// Bits of `context_init` with the capability set of a context.
pub const VIRTIO_GPU_CONTEXT_INIT_CAPSET_ID_MASK: u32 = 0xff;

pub const VIRTIO_GPU_BLOB_MEM_GUEST: u32 = 1;
pub const VIRTIO_GPU_BLOB_MEM_HOST3D: u32 = 2;
pub const VIRTIO_GPU_BLOB_FLAG_USE_MAPPABLE: u32 = 1;
pub const VIRTIO_GPU_BLOB_FLAG_USE_SHAREABLE: u32 = 2;
pub const VIRTIO_GPU_BLOB_FLAG_USE_CROSS_DEVICE: u32 = 4;
/// All of them.
pub const VIRTIO_GPU_BLOB_FLAGS: u32 = 7;

/// Pixel formats (5.7.6.8), named by bytes in memory.
pub const VIRTIO_GPU_FORMAT_B8G8R8A8_UNORM: u32 = 1;
pub const VIRTIO_GPU_FORMAT_B8G8R8X8_UNORM: u32 = 2;
pub const VIRTIO_GPU_FORMAT_A8R8G8B8_UNORM: u32 = 3;
pub const VIRTIO_GPU_FORMAT_X8R8G8B8_UNORM: u32 = 4;
pub const VIRTIO_GPU_FORMAT_R8G8B8A8_UNORM: u32 = 67;
pub const VIRTIO_GPU_FORMAT_X8B8G8R8_UNORM: u32 = 68;
pub const VIRTIO_GPU_FORMAT_A8B8G8R8_UNORM: u32 = 121;
pub const VIRTIO_GPU_FORMAT_R8G8B8X8_UNORM: u32 = 134;

/// Declares structures of the wire, with the size that each must have.
macro_rules! wire {
    ($($(#[$meta:meta])* $name:ident: $size:literal { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$meta])*
            #[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
            #[repr(C)]
            pub struct $name {
                $(pub $field: $type,)*
            }
            impl Default for $name {
                fn default() -> Self {
                    zerocopy::FromZeros::new_zeroed()
                }
            }
        )*
        #[cfg(test)]
        const SIZES: &[(&str, usize, usize)] = &[$((stringify!($name), size_of::<$name>(), $size),)*];
    };
}

wire! {
    /// `struct virtio_gpu_config` (5.7.4).
    Config: 20 {
        events_read: U32,
        events_clear: U32,
        num_scanouts: U32,
        num_capsets: U32,
        blob_alignment: U32,
    }
    /// `struct virtio_gpu_ctrl_hdr` (5.7.6.7).
    CtrlHdr: 24 {
        type_: U32,
        flags: U32,
        fence_id: U64,
        ctx_id: U32,
        ring_idx: u8,
        padding: [u8; 3],
    }
    /// `struct virtio_gpu_rect`.
    Rect: 16 {
        x: U32,
        y: U32,
        width: U32,
        height: U32,
    }
    /// `struct virtio_gpu_display_one`.
    DisplayOne: 24 {
        r: Rect,
        enabled: U32,
        flags: U32,
    }
    /// `struct virtio_gpu_resp_display_info`, behind its header.
    RespDisplayInfo: 384 {
        pmodes: [DisplayOne; VIRTIO_GPU_MAX_SCANOUTS],
    }
    /// `struct virtio_gpu_get_edid`, behind its header, as are all that follow.
    GetEdid: 8 {
        scanout: U32,
        padding: U32,
    }
    /// `struct virtio_gpu_resp_edid`.
    RespEdid: 1032 {
        size: U32,
        padding: U32,
        edid: [u8; 1024],
    }
    /// `struct virtio_gpu_resource_create_2d`.
    ResourceCreate2d: 16 {
        resource_id: U32,
        format: U32,
        width: U32,
        height: U32,
    }
    /// `struct virtio_gpu_resource_unref`, and all others that name a resource only.
    ResourceId: 8 {
        resource_id: U32,
        padding: U32,
    }
    /// `struct virtio_gpu_set_scanout`.
    SetScanout: 24 {
        r: Rect,
        scanout_id: U32,
        resource_id: U32,
    }
    /// `struct virtio_gpu_resource_flush`.
    ResourceFlush: 24 {
        r: Rect,
        resource_id: U32,
        padding: U32,
    }
    /// `struct virtio_gpu_transfer_to_host_2d`.
    TransferToHost2d: 32 {
        r: Rect,
        offset: U64,
        resource_id: U32,
        padding: U32,
    }
    /// `struct virtio_gpu_resource_attach_backing`; entries follow.
    ResourceAttachBacking: 8 {
        resource_id: U32,
        nr_entries: U32,
    }
    /// `struct virtio_gpu_mem_entry`.
    MemEntry: 16 {
        addr: U64,
        length: U32,
        padding: U32,
    }
    /// `struct virtio_gpu_resp_resource_uuid`.
    RespResourceUuid: 16 {
        uuid: [u8; 16],
    }
    /// `struct virtio_gpu_resource_create_blob`; entries follow.
    ResourceCreateBlob: 32 {
        resource_id: U32,
        blob_mem: U32,
        blob_flags: U32,
        nr_entries: U32,
        blob_id: U64,
        size: U64,
    }
    /// `struct virtio_gpu_set_scanout_blob`.
    SetScanoutBlob: 72 {
        r: Rect,
        scanout_id: U32,
        resource_id: U32,
        width: U32,
        height: U32,
        format: U32,
        padding: U32,
        strides: [U32; 4],
        offsets: [U32; 4],
    }
    /// `struct virtio_gpu_get_capset_info`.
    GetCapsetInfo: 8 {
        capset_index: U32,
        padding: U32,
    }
    /// `struct virtio_gpu_resp_capset_info`.
    RespCapsetInfo: 16 {
        capset_id: U32,
        capset_max_version: U32,
        capset_max_size: U32,
        padding: U32,
    }
    /// `struct virtio_gpu_get_capset`; the response is the content.
    GetCapset: 8 {
        capset_id: U32,
        capset_version: U32,
    }
    /// `struct virtio_gpu_ctx_create` (5.7.6.9).
    CtxCreate: 72 {
        nlen: U32,
        context_init: U32,
        debug_name: [u8; 64],
    }
    /// `struct virtio_gpu_resource_create_3d`.
    ResourceCreate3d: 48 {
        resource_id: U32,
        target: U32,
        format: U32,
        bind: U32,
        width: U32,
        height: U32,
        depth: U32,
        array_size: U32,
        last_level: U32,
        nr_samples: U32,
        flags: U32,
        padding: U32,
    }
    /// `struct virtio_gpu_box`.
    Box3d: 24 {
        x: U32,
        y: U32,
        z: U32,
        w: U32,
        h: U32,
        d: U32,
    }
    /// `struct virtio_gpu_transfer_host_3d`.
    TransferHost3d: 48 {
        box_: Box3d,
        offset: U64,
        resource_id: U32,
        level: U32,
        stride: U32,
        layer_stride: U32,
    }
    /// `struct virtio_gpu_cmd_submit`; the stream follows.
    CmdSubmit: 8 {
        size: U32,
        padding: U32,
    }
    /// `struct virtio_gpu_resource_map_blob`.
    ResourceMapBlob: 16 {
        resource_id: U32,
        padding: U32,
        offset: U64,
    }
    /// `struct virtio_gpu_resp_map_info`.
    RespMapInfo: 8 {
        map_info: U32,
        padding: U32,
    }
    /// `struct virtio_gpu_update_cursor` (5.7.6.10).
    UpdateCursor: 32 {
        scanout_id: U32,
        x: U32,
        y: U32,
        pos_padding: U32,
        resource_id: U32,
        hot_x: U32,
        hot_y: U32,
        padding: U32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_of_the_specification() {
        for (name, size, expected) in SIZES {
            assert_eq!(size, expected, "{name}");
        }
        assert_eq!(std::mem::offset_of!(CtrlHdr, fence_id), 8);
        assert_eq!(std::mem::offset_of!(SetScanoutBlob, strides), 40);
        assert_eq!(std::mem::offset_of!(ResourceCreateBlob, size), 24);
    }
}
