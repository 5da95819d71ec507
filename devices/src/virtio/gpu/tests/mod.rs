//! The device behind queues in memory, driven as Linux drives it, and by drivers that break the rules.

use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes};

use super::{device::FEATURES, protocol::*, *};
use crate::{
    dmabuf::Exporter,
    memory::{AddressSpace, GuestRam},
    virtio::{
        VirtioDevice,
        test_util::{Driver, WRITE},
    },
};

mod cursors;
mod mistakes;
mod outputs;
mod pacing;
mod pixels;
mod streams;

const ALL: u64 = FEATURES;
const REQUEST: u64 = 0x10_0000;
const RESPONSE: u64 = 0x1f_0000;
/// Memory for pixels, from here on.
const PIXELS: u64 = 0x100_0000;
const XRGB: u32 = VIRTIO_GPU_FORMAT_B8G8R8X8_UNORM;
const BUDGET: u64 = 64 << 20;

struct Machine {
    driver: Driver,
    gpu: Gpu,
    display: DisplayHandle,
    map: Arc<AddressSpace>,
}

fn mode(width: u32, height: u32) -> Mode {
    Mode { width, height }
}

fn machine_with(features: u64) -> Machine {
    machine_of(features, Exporter::open())
}

fn machine_of(features: u64, exporter: Exporter) -> Machine {
    let ram = GuestRam::new(64 << 20, None).unwrap();
    let map = Arc::new(AddressSpace::new());
    ram.insert_into(&map).unwrap();
    let config = DisplayConfig {
        outputs: vec![mode(640, 480), mode(800, 600)],
        name: "Test".into(),
        max_resource_memory: BUDGET,
    };
    let display = DisplayHandle::new(config, Arc::new(exporter)).unwrap();
    let mut gpu = Gpu::new(display.clone(), map.clone());
    let driver = Driver::with_memory(2, ram.memory().clone());
    gpu.activate(driver.activation_with(features)).unwrap();
    Machine {
        driver,
        gpu,
        display,
        map,
    }
}

fn machine() -> Machine {
    machine_with(ALL)
}

fn header(type_: u32, fence: Option<u64>) -> CtrlHdr {
    CtrlHdr {
        type_: type_.into(),
        flags: u32::from(fence.is_some()).into(),
        fence_id: fence.unwrap_or(0).into(),
        ..Default::default()
    }
}

pub(in crate::virtio::gpu) fn rect(x: u32, y: u32, width: u32, height: u32) -> Rect {
    Rect {
        x: x.into(),
        y: y.into(),
        width: width.into(),
        height: height.into(),
    }
}

impl Machine {
    /// Puts a request where the driver's buffers are; its length.
    fn prepare(&self, header: CtrlHdr, body: &[u8]) -> u32 {
        let request = [header.as_bytes(), body].concat();
        self.driver.write(REQUEST, &request);
        request.len() as u32
    }

    fn response(&self, written: u32) -> (CtrlHdr, Vec<u8>) {
        let bytes = self.driver.read(RESPONSE, written as usize);
        let (header, rest) = CtrlHdr::read_from_prefix(&bytes).unwrap();
        (header, rest.to_vec())
    }

    fn on_queue(&mut self, queue: u16, header: CtrlHdr, body: &[u8]) -> (CtrlHdr, Vec<u8>) {
        let len = self.prepare(header, body);
        let chain = [(REQUEST, len, 0), (RESPONSE, 4096, WRITE)];
        let written = self.driver.request(queue.into(), &chain);
        self.response(written)
    }

    fn command(&mut self, type_: u32, body: &(impl IntoBytes + zerocopy::Immutable)) -> u32 {
        let (answer, _) = self.on_queue(CONTROL_QUEUE, header(type_, None), body.as_bytes());
        answer.type_.get()
    }

    #[track_caller]
    fn ok(&mut self, type_: u32, body: &(impl IntoBytes + zerocopy::Immutable)) {
        assert_eq!(self.command(type_, body), VIRTIO_GPU_RESP_OK_NODATA);
    }

    fn create_2d(&mut self, id: u32, width: u32, height: u32) -> u32 {
        let command = ResourceCreate2d {
            resource_id: id.into(),
            format: XRGB.into(),
            width: width.into(),
            height: height.into(),
        };
        self.command(VIRTIO_GPU_CMD_RESOURCE_CREATE_2D, &command)
    }

    fn with_entries(&mut self, type_: u32, command: &[u8], entries: &[(u64, u32)]) -> u32 {
        let mut body = command.to_vec();
        for &(addr, length) in entries {
            let entry = MemEntry {
                addr: addr.into(),
                length: length.into(),
                padding: 0.into(),
            };
            body.extend(entry.as_bytes());
        }
        let (answer, _) = self.on_queue(CONTROL_QUEUE, header(type_, None), &body);
        answer.type_.get()
    }

    fn attach(&mut self, id: u32, entries: &[(u64, u32)]) -> u32 {
        let command = ResourceAttachBacking {
            resource_id: id.into(),
            nr_entries: (entries.len() as u32).into(),
        };
        let type_ = VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING;
        self.with_entries(type_, command.as_bytes(), entries)
    }

    fn create_blob(&mut self, id: u32, size: u64, entries: &[(u64, u32)]) -> u32 {
        let command = ResourceCreateBlob {
            resource_id: id.into(),
            blob_mem: VIRTIO_GPU_BLOB_MEM_GUEST.into(),
            blob_flags: 2.into(),
            nr_entries: (entries.len() as u32).into(),
            size: size.into(),
            ..Default::default()
        };
        let type_ = VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB;
        self.with_entries(type_, command.as_bytes(), entries)
    }

    fn on_resource(&mut self, type_: u32, id: u32) -> u32 {
        let command = ResourceId {
            resource_id: id.into(),
            padding: 0.into(),
        };
        self.command(type_, &command)
    }

    fn set_scanout(&mut self, scanout: u32, id: u32, r: Rect) -> u32 {
        let command = SetScanout {
            r,
            scanout_id: scanout.into(),
            resource_id: id.into(),
        };
        self.command(VIRTIO_GPU_CMD_SET_SCANOUT, &command)
    }

    fn flush(&mut self, id: u32, r: Rect) -> u32 {
        let command = ResourceFlush {
            r,
            resource_id: id.into(),
            padding: 0.into(),
        };
        self.command(VIRTIO_GPU_CMD_RESOURCE_FLUSH, &command)
    }

    fn transfer(&mut self, id: u32, r: Rect, offset: u64) -> u32 {
        let command = TransferToHost2d {
            r,
            offset: offset.into(),
            resource_id: id.into(),
            padding: 0.into(),
        };
        self.command(VIRTIO_GPU_CMD_TRANSFER_TO_HOST_2D, &command)
    }

    fn update_cursor(&mut self, command: &UpdateCursor) -> u32 {
        let header = header(VIRTIO_GPU_CMD_UPDATE_CURSOR, None);
        let (answer, _) = self.on_queue(CURSOR_QUEUE, header, command.as_bytes());
        answer.type_.get()
    }
}

fn scanout_blob(scanout: u32, id: u32, size: (u32, u32), r: Rect) -> SetScanoutBlob {
    SetScanoutBlob {
        r,
        scanout_id: scanout.into(),
        resource_id: id.into(),
        width: size.0.into(),
        height: size.1.into(),
        format: XRGB.into(),
        strides: [(size.0 * 4).into(), 0.into(), 0.into(), 0.into()],
        ..Default::default()
    }
}

/// A pattern in which every pixel differs from its neighbours.
fn pattern(width: u32, height: u32) -> Vec<u8> {
    let pixels = (0..height).flat_map(|y| (0..width).map(move |x| [x as u8, y as u8, 0x5a, 0]));
    pixels.flatten().collect()
}
