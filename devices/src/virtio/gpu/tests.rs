//! The device behind queues in memory, driven as Linux drives it, and as nobody should.

use std::{os::fd::AsRawFd, sync::Arc};

use proptest::prelude::*;
use zerocopy::FromBytes;

use super::*;
use crate::{
    dmabuf::Exporter,
    memory::{Backing, BackingKind, GuestRam},
    virtio::test_util::{Driver, WRITE},
};

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
}

fn mode(width: u32, height: u32) -> Mode {
    Mode { width, height }
}

fn machine_with(features: u64) -> Machine {
    let ram = GuestRam::new(64 << 20, None).unwrap();
    let map = Arc::new(AddressSpace::new());
    ram.insert_into(&map).unwrap();
    let config = DisplayConfig {
        outputs: vec![mode(640, 480), mode(800, 600)],
        name: "Test".into(),
        max_resource_memory: BUDGET,
    };
    let display = DisplayHandle::new(config, Arc::new(Exporter::open())).unwrap();
    let mut gpu = Gpu::new(display.clone(), map);
    let driver = Driver::with_memory(2, ram.memory().clone());
    gpu.activate(driver.activation_with(features)).unwrap();
    Machine {
        driver,
        gpu,
        display,
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

fn rect(x: u32, y: u32, width: u32, height: u32) -> Rect {
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

#[test]
fn outputs_are_told_and_changes_are_events() {
    let mut machine = machine();
    let get = header(VIRTIO_GPU_CMD_GET_DISPLAY_INFO, Some(7));
    let (answer, body) = machine.on_queue(CONTROL_QUEUE, get, &[]);
    assert_eq!(answer.type_.get(), VIRTIO_GPU_RESP_OK_DISPLAY_INFO);
    assert_eq!((answer.flags.get(), answer.fence_id.get()), (1, 7));
    let info = RespDisplayInfo::read_from_bytes(&body).unwrap();
    assert_eq!(info.pmodes[1].r.x.get(), 640);
    assert_eq!(info.pmodes[1].r.height.get(), 600);
    assert_eq!(info.pmodes[1].enabled.get(), 1);
    assert_eq!(info.pmodes[2].enabled.get(), 0);

    machine
        .display
        .set_output(2, Some(mode(1024, 768)))
        .unwrap();
    machine.display.set_output(0, None).unwrap();
    let mut events = [0; 4];
    machine.gpu.read_config(0, &mut events);
    assert_eq!(events, [1, 0, 0, 0]);
    assert_eq!(machine.driver.status.generation(), 2);
    machine.gpu.write_config(4, &[1, 0, 0, 0]);
    machine.gpu.read_config(0, &mut events);
    assert_eq!(
        events,
        [1, 0, 0, 0],
        "the driver has not asked for all of it"
    );
    let get = header(VIRTIO_GPU_CMD_GET_DISPLAY_INFO, None);
    let (_, body) = machine.on_queue(CONTROL_QUEUE, get, &[]);
    let info = RespDisplayInfo::read_from_bytes(&body).unwrap();
    let enabled: Vec<_> = info.pmodes.iter().map(|one| one.enabled.get()).collect();
    assert_eq!(enabled[..4], [0, 1, 1, 0]);

    let get = GetEdid {
        scanout: 2.into(),
        padding: 0.into(),
    };
    let header = header(VIRTIO_GPU_CMD_GET_EDID, None);
    let (answer, body) = machine.on_queue(CONTROL_QUEUE, header, get.as_bytes());
    assert_eq!(answer.type_.get(), VIRTIO_GPU_RESP_OK_EDID);
    let response = RespEdid::read_from_bytes(&body).unwrap();
    let size = response.size.get() as usize;
    assert_eq!(response.edid[..size], edid(mode(1024, 768), "Test", 2));
}

#[test]
fn a_change_while_the_driver_asks_is_told_again() {
    let mut machine = machine();
    let events = |machine: &Machine| {
        let mut events = [0; 4];
        machine.gpu.read_config(0, &mut events);
        events[0]
    };
    let ask = |machine: &mut Machine, output: u8| {
        let edid = header(VIRTIO_GPU_CMD_GET_EDID, None);
        machine.on_queue(CONTROL_QUEUE, edid, &[output, 0, 0, 0, 0, 0, 0, 0]);
        let info = header(VIRTIO_GPU_CMD_GET_DISPLAY_INFO, None);
        machine.on_queue(CONTROL_QUEUE, info, &[]);
    };
    let set = |machine: &Machine, width| {
        let mode = Some(mode(width, 600));
        machine.display.set_output(0, mode).unwrap();
    };
    set(&machine, 700);
    ask(&mut machine, 0);
    set(&machine, 701);
    machine.gpu.write_config(4, &[1, 0, 0, 0]);
    assert_eq!(events(&machine), 1);
    assert_eq!(machine.driver.status.generation(), 3);
    ask(&mut machine, 0);
    machine.gpu.write_config(4, &[1, 0, 0, 0]);
    assert_eq!(events(&machine), 0);
    // A driver that never asks is not told for ever.
    set(&machine, 702);
    machine.gpu.write_config(4, &[1, 0, 0, 0]);
    assert_eq!(events(&machine), 0);
}

#[test]
fn outputs_that_cannot_be_are_refused() {
    let machine = machine();
    let set = |index, mode| machine.display.set_output(index, mode);
    assert!(matches!(set(16, None), Err(DisplayError::NoOutput(16))));
    for bad in [mode(0, 600), mode(600, 20000)] {
        assert!(matches!(set(0, Some(bad)), Err(DisplayError::BadMode(_))));
    }
    assert!(matches!(
        machine.display.read_scanout(0),
        Err(DisplayError::Dark(0))
    ));
}

#[test]
fn a_2d_resource_shows_what_was_transferred() {
    let mut machine = machine();
    let (width, height) = (70, 40);
    assert_eq!(
        machine.create_2d(1, width, height),
        VIRTIO_GPU_RESP_OK_NODATA
    );
    let pixels = pattern(width, height);
    machine.driver.write(PIXELS, &pixels[..4096]);
    machine.driver.write(PIXELS + 0x1_0000, &pixels[4096..]);
    let entries = [(PIXELS, 4096), (PIXELS + 0x1_0000, 0x8000)];
    assert_eq!(machine.attach(1, &entries), VIRTIO_GPU_RESP_OK_NODATA);
    assert_eq!(machine.attach(1, &entries), VIRTIO_GPU_RESP_ERR_UNSPEC);
    let whole = rect(0, 0, width, height);
    assert_eq!(machine.transfer(1, whole, 0), VIRTIO_GPU_RESP_OK_NODATA);
    assert_eq!(machine.set_scanout(1, 1, whole), VIRTIO_GPU_RESP_OK_NODATA);
    assert_eq!(machine.flush(1, whole), VIRTIO_GPU_RESP_OK_NODATA);
    assert_eq!(machine.display.read_scanout(1).unwrap().bytes, pixels);

    // A part of it, and a part shown.
    machine.driver.write(PIXELS, &[0xff; 4096]);
    let (part, offset) = (rect(3, 2, 5, 4), u64::from(2 * width + 3) * 4);
    assert_eq!(machine.transfer(1, part, offset), VIRTIO_GPU_RESP_OK_NODATA);
    assert_eq!(
        machine.set_scanout(1, 1, rect(2, 2, 8, 8)),
        VIRTIO_GPU_RESP_OK_NODATA
    );
    let shown = machine.display.read_scanout(1).unwrap();
    assert_eq!((shown.width, shown.height), (8, 8));
    assert_eq!(shown.rgba(0, 0), Some([0x5a, 2, 2, 0xff]));
    assert_eq!(shown.rgba(1, 3), Some([0xff; 4]));
    assert_eq!(shown.rgba(1, 4), Some([0x5a, 6, 3, 0xff]));
    let transferred = u64::from(width * height + 20) * 4;
    assert_eq!(machine.display.statistics().transferred_bytes, transferred);

    let unref = VIRTIO_GPU_CMD_RESOURCE_UNREF;
    assert_eq!(machine.on_resource(unref, 1), VIRTIO_GPU_RESP_OK_NODATA);
    assert!(machine.display.frame(1).unwrap().is_none());
    assert_eq!(machine.display.statistics().resource_memory, 0);
}

#[test]
fn a_blob_is_shown_in_place() {
    let mut machine = machine();
    let entries = [(PIXELS + 0x2000, 0x1000), (PIXELS, 0x2000)];
    assert_eq!(
        machine.create_blob(5, 0x3000, &entries),
        VIRTIO_GPU_RESP_OK_NODATA
    );
    let mut command = scanout_blob(0, 5, (32, 16), rect(0, 0, 32, 16));
    command.offsets[0] = 0x800.into();
    machine.ok(VIRTIO_GPU_CMD_SET_SCANOUT_BLOB, &command);
    let pixels = pattern(32, 16);
    machine.driver.write(PIXELS + 0x2800, &pixels);
    assert_eq!(machine.display.read_scanout(0).unwrap().bytes, pixels);
    // Shared, not copied: no command is sent.
    machine.driver.write(PIXELS + 0x2804, &[9, 8, 7, 0]);
    let shown = machine.display.read_scanout(0).unwrap();
    assert_eq!(shown.rgba(1, 0), Some([7, 8, 9, 0xff]));
    assert_eq!(
        machine.transfer(5, rect(0, 0, 32, 16), 0),
        VIRTIO_GPU_RESP_OK_NODATA
    );
    assert_eq!(machine.display.statistics().transferred_bytes, 0);
}

/// A BAR's file stands for the device: the first half of the road is the same.
#[test]
fn what_is_shown_goes_and_comes_with_the_devices_memory() {
    const BAR: u64 = 0x1_0000_0000;
    let mut machine = machine();
    let map = machine.gpu.map.clone();
    let file = Arc::new(tempfile::tempfile().unwrap());
    std::os::unix::fs::FileExt::write_all_at(&*file, &[7; 0x4000], 0).unwrap();
    let insert = |region| {
        let kind = BackingKind::Bar { device: 0, region };
        let (file, offset) = (file.clone(), 0);
        let backing = Backing { kind, file, offset };
        map.insert_backed(BAR, 0x4000, backing).unwrap();
    };
    insert(2);
    machine.create_blob(5, 0x1000, &[(BAR + 0x1000, 0x1000)]);
    let command = scanout_blob(3, 5, (32, 32), rect(0, 0, 32, 32));
    machine.ok(VIRTIO_GPU_CMD_SET_SCANOUT_BLOB, &command);
    let picture = |machine: &Machine| machine.display.read_scanout(3).map(|p| p.bytes[0]);
    assert_eq!(picture(&machine).unwrap(), 7);
    let watcher = machine.display.subscribe(false).unwrap();
    watcher.events();
    let heard = || match &watcher.events()[..] {
        [
            DisplayEvent::Scanout {
                output: 3,
                frame,
                gone,
            },
        ] => {
            let location = frame.as_ref().map(|frame| frame.location);
            (location, *gone)
        }
        other => panic!("{other:?}"),
    };
    map.remove(BAR, 0x4000).unwrap();
    assert_eq!(heard(), (None, true));
    assert!(matches!(picture(&machine), Err(DisplayError::Gone(3))));
    assert!(machine.display.export_resource(5).is_err());
    // Another BAR where it was is not it; memory elsewhere changes nothing.
    insert(0);
    map.remove(BAR, 0x4000).unwrap();
    assert!(watcher.events().is_empty());
    insert(2);
    assert_eq!(heard(), (Some(Location::Device), false));
    assert_eq!(picture(&machine).unwrap(), 7);
    map.remove(BAR, 0x4000).unwrap();
    // A driver that has its memory elsewhere meanwhile is followed.
    let detach = VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING;
    assert_eq!(machine.on_resource(detach, 5), VIRTIO_GPU_RESP_OK_NODATA);
    machine.driver.write(PIXELS, &[9; 0x1000]);
    machine.attach(5, &[(PIXELS, 0x1000)]);
    assert_eq!(heard(), (Some(Location::GuestRam), false));
    assert_eq!(picture(&machine).unwrap(), 9);
}

#[test]
fn a_blob_that_moves_is_shown_again() {
    let mut machine = machine();
    let (from, to) = (PIXELS, PIXELS + 0x10_0000);
    machine.driver.write(from, &[1; 0x1000]);
    machine.driver.write(to, &[2; 0x1000]);
    machine.create_blob(5, 0x1000, &[(from, 0x1000)]);
    let command = scanout_blob(3, 5, (32, 32), rect(0, 0, 32, 32));
    machine.ok(VIRTIO_GPU_CMD_SET_SCANOUT_BLOB, &command);
    let watcher = machine.display.subscribe(false).unwrap();
    watcher.events();
    let shown = |events: Vec<DisplayEvent>| match &events[..] {
        [
            DisplayEvent::Scanout {
                output: 3, frame, ..
            },
        ] => frame.as_ref().map(|frame| frame.read().unwrap().bytes[0]),
        other => panic!("{other:?}"),
    };
    let detach = VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING;
    assert_eq!(machine.on_resource(detach, 5), VIRTIO_GPU_RESP_OK_NODATA);
    assert_eq!(shown(watcher.events()), None);
    assert_eq!(machine.on_resource(detach, 5), VIRTIO_GPU_RESP_ERR_UNSPEC);
    assert_eq!(
        machine.attach(5, &[(to, 0x800)]),
        VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER
    );
    assert_eq!(
        machine.attach(5, &[(to, 0x1000)]),
        VIRTIO_GPU_RESP_OK_NODATA
    );
    assert_eq!(shown(watcher.events()), Some(2));
}

#[test]
fn two_outputs_show_parts_of_one_blob() {
    let mut machine = machine();
    machine.create_blob(1, 0x4000, &[(PIXELS, 0x4000)]);
    machine.driver.write(PIXELS, &pattern(64, 64));
    for (output, x) in [(0, 0), (1, 32)] {
        let command = scanout_blob(output, 1, (64, 64), rect(x, 0, 32, 64));
        machine.ok(VIRTIO_GPU_CMD_SET_SCANOUT_BLOB, &command);
    }
    let right = machine.display.read_scanout(1).unwrap();
    assert_eq!(right.rgba(0, 9), Some([0x5a, 9, 32, 0xff]));
    let watcher = machine.display.subscribe(false).unwrap();
    watcher.events();
    assert_eq!(
        machine.flush(1, rect(30, 5, 10, 10)),
        VIRTIO_GPU_RESP_OK_NODATA
    );
    let damage: Vec<_> = watcher
        .events()
        .into_iter()
        .map(|event| match event {
            DisplayEvent::Damage { output, areas, .. } => (output, areas[0].x, areas[0].width),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(damage, [(0, 30, 2), (1, 0, 8)]);
    assert_eq!(
        machine.flush(1, rect(0, 0, 65, 1)),
        VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER
    );
    // Off, and on again.
    assert_eq!(
        machine.set_scanout(1, 0, rect(0, 0, 0, 0)),
        VIRTIO_GPU_RESP_OK_NODATA
    );
    assert!(machine.display.frame(1).unwrap().is_none());
    let command = scanout_blob(1, 1, (64, 64), rect(32, 0, 32, 64));
    machine.ok(VIRTIO_GPU_CMD_SET_SCANOUT_BLOB, &command);
    assert!(machine.display.frame(1).unwrap().is_some());
}

#[test]
fn cursors_are_seen_and_moved() {
    let mut machine = machine();
    machine.create_blob(4, 0x4000, &[(PIXELS, 0x4000)]);
    machine.driver.write(PIXELS, &[1, 2, 3, 4]);
    let watcher = machine.display.subscribe(false).unwrap();
    watcher.events();
    let mut command = UpdateCursor {
        scanout_id: 1.into(),
        x: u32::MAX.into(),
        y: 20.into(),
        resource_id: 4.into(),
        hot_x: 3.into(),
        ..Default::default()
    };
    assert_eq!(machine.update_cursor(&command), VIRTIO_GPU_RESP_OK_NODATA);
    let cursor = machine.display.cursor(1).unwrap();
    assert_eq!((cursor.x, cursor.y), (-1, 20));
    let image = cursor.image.unwrap();
    assert_eq!((image.hot_x, &image.rgba[..4]), (3, &[3, 2, 1, 4][..]));
    assert_eq!(watcher.events().len(), 2);

    command.x = 5.into();
    let move_ = header(VIRTIO_GPU_CMD_MOVE_CURSOR, Some(3));
    let (answer, _) = machine.on_queue(CURSOR_QUEUE, move_, command.as_bytes());
    assert_eq!((answer.flags.get(), answer.fence_id.get()), (1, 3));
    assert!(matches!(
        watcher.events()[..],
        [DisplayEvent::CursorPosition { x: 5, y: 20, .. }]
    ));
    command.resource_id = 0.into();
    assert_eq!(machine.update_cursor(&command), VIRTIO_GPU_RESP_OK_NODATA);
    assert!(machine.display.cursor(1).unwrap().image.is_none());
    // A cursor that is no 64x64, a screen that is none, a resource that is none, a command that is none.
    machine.create_2d(6, 32, 32);
    for (resource, scanout, expected) in [
        (6, 0, VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER),
        (4, 16, VIRTIO_GPU_RESP_ERR_INVALID_SCANOUT_ID),
        (7, 0, VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID),
    ] {
        command.resource_id = resource.into();
        command.scanout_id = scanout.into();
        assert_eq!(machine.update_cursor(&command), expected);
    }
    let flush = header(VIRTIO_GPU_CMD_RESOURCE_FLUSH, None);
    let (answer, _) = machine.on_queue(CURSOR_QUEUE, flush, command.as_bytes());
    assert_eq!(answer.type_.get(), VIRTIO_GPU_RESP_ERR_UNSPEC);
}

#[test]
fn a_pacing_watcher_delays_fences_but_not_for_long() {
    let mut machine = machine();
    machine.create_blob(1, 0x4000, &[(PIXELS, 0x4000)]);
    let whole = rect(0, 0, 64, 64);
    let command = scanout_blob(0, 1, (64, 64), whole);
    machine.ok(VIRTIO_GPU_CMD_SET_SCANOUT_BLOB, &command);
    let watcher = machine.display.subscribe(true).unwrap();
    watcher.events();
    let flush = ResourceFlush {
        r: whole,
        resource_id: 1.into(),
        padding: 0.into(),
    };
    let submit = |machine: &Machine, fence| {
        let header = header(VIRTIO_GPU_CMD_RESOURCE_FLUSH, Some(fence));
        let len = machine.prepare(header, flush.as_bytes());
        let before = machine.driver.used_index(0);
        let chain = [(REQUEST, len, 0), (RESPONSE, 64, WRITE)];
        machine.driver.submit(0, &chain);
        before
    };
    let damage = |watcher: &Subscription| {
        let events = watcher.events();
        events.iter().find_map(|event| match event {
            DisplayEvent::Damage { serial, .. } => Some(*serial),
            _ => None,
        })
    };
    let before = submit(&machine, 1);
    // Once the watcher knows of the frame, its fence is held.
    machine.driver.wait(|_| watcher.has_news());
    watcher.release(damage(&watcher).unwrap());
    machine
        .driver
        .wait(|driver| driver.used_index(0) == before.wrapping_add(1));

    // One that never releases: this fence waits, the next one does not.
    let start = Instant::now();
    let before = submit(&machine, 2);
    machine
        .driver
        .wait(|driver| driver.used_index(0) == before.wrapping_add(1));
    assert!(start.elapsed() >= PATIENCE);
    let before = submit(&machine, 3);
    machine
        .driver
        .wait(|driver| driver.used_index(0) == before.wrapping_add(1));
}

impl Subscription {
    fn has_news(&self) -> bool {
        let mut fds = [libc::pollfd {
            fd: rustix::fd::AsFd::as_fd(self).as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        }];
        // SAFETY: `fds` is one `pollfd`, as the call says.
        unsafe { libc::poll(fds.as_mut_ptr(), 1, 0) == 1 }
    }
}

#[test]
fn every_mistake_has_its_error() {
    use protocol as p;
    const NO_RESOURCE: u32 = VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID;
    const BAD: u32 = VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER;
    let mut machine = machine();
    assert_eq!(machine.create_2d(0, 8, 8), NO_RESOURCE);
    assert_eq!(machine.create_2d(1, 8, 8), VIRTIO_GPU_RESP_OK_NODATA);
    assert_eq!(machine.create_2d(1, 8, 8), NO_RESOURCE);
    for (width, height) in [(0, 1), (1, 0), (16385, 1), (u32::MAX, u32::MAX)] {
        assert_eq!(machine.create_2d(2, width, height), BAD);
    }
    assert_eq!(
        machine.create_2d(2, 16384, 16384),
        VIRTIO_GPU_RESP_ERR_OUT_OF_MEMORY
    );

    let blob = |machine: &mut Machine, size, entries: &[_]| machine.create_blob(3, size, entries);
    assert_eq!(blob(&mut machine, 0, &[]), BAD);
    assert_eq!(blob(&mut machine, 0x1001, &[(PIXELS, 0x2000)]), BAD);
    assert_eq!(blob(&mut machine, 0x2000, &[(PIXELS, 0x1000)]), BAD);
    assert_eq!(blob(&mut machine, 0x1000, &[(64 << 20, 0x1000)]), BAD);
    assert_eq!(blob(&mut machine, 0x1000, &[(u64::MAX, 0x1000)]), BAD);
    let huge = blob(&mut machine, 1 << 60, &[(0, u32::MAX)]);
    assert_eq!(huge, VIRTIO_GPU_RESP_ERR_OUT_OF_MEMORY);
    let mut command = p::ResourceCreateBlob {
        resource_id: 3.into(),
        blob_mem: 2.into(),
        size: 0x1000.into(),
        ..Default::default()
    };
    assert_eq!(
        machine.command(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, &command),
        BAD
    );
    command.blob_mem = 1.into();
    command.nr_entries = u32::MAX.into();
    assert_eq!(
        machine.command(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, &command),
        BAD
    );
    command.nr_entries = 1.into();
    assert_eq!(
        machine.command(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, &command),
        BAD
    );
    command.nr_entries = 0.into();
    machine.ok(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, &command);

    assert_eq!(
        machine.set_scanout(16, 1, rect(0, 0, 8, 8)),
        VIRTIO_GPU_RESP_ERR_INVALID_SCANOUT_ID
    );
    assert_eq!(machine.set_scanout(0, 9, rect(0, 0, 8, 8)), NO_RESOURCE);
    assert_eq!(machine.set_scanout(0, 3, rect(0, 0, 8, 8)), NO_RESOURCE);
    for r in [
        rect(0, 0, 9, 8),
        rect(1, 0, 8, 8),
        rect(0, 0, 0, 8),
        rect(u32::MAX, 0, 1, 1),
    ] {
        assert_eq!(machine.set_scanout(0, 1, r), BAD);
        assert_eq!(machine.flush(1, r), BAD);
        assert_eq!(machine.transfer(1, r, 0), BAD);
    }
    assert_eq!(
        machine.transfer(1, rect(0, 0, 8, 8), 0),
        VIRTIO_GPU_RESP_ERR_UNSPEC
    );
    assert_eq!(
        machine.attach(1, &[(PIXELS, 256)]),
        VIRTIO_GPU_RESP_OK_NODATA
    );
    for offset in [1, u64::MAX, u64::MAX - 255] {
        assert_eq!(machine.transfer(1, rect(0, 0, 8, 8), offset), BAD);
    }
    assert_eq!(machine.flush(9, rect(0, 0, 1, 1)), NO_RESOURCE);

    let good = scanout_blob(0, 3, (32, 32), rect(0, 0, 32, 32));
    machine.ok(VIRTIO_GPU_CMD_SET_SCANOUT_BLOB, &good);
    assert!(
        machine.display.frame(0).unwrap().is_none(),
        "it has no memory"
    );
    type Spoil = fn(&mut SetScanoutBlob);
    let spoilers: [Spoil; 7] = [
        |c| c.width = 33.into(),
        |c| c.height = u32::MAX.into(),
        |c| c.format = 5.into(),
        |c| c.strides[0] = 127.into(),
        |c| c.strides[0] = u32::MAX.into(),
        |c| c.offsets[0] = 1.into(),
        |c| c.r.x = 1.into(),
    ];
    for spoil in spoilers {
        let mut command = good;
        spoil(&mut command);
        assert_eq!(
            machine.command(VIRTIO_GPU_CMD_SET_SCANOUT_BLOB, &command),
            BAD
        );
    }
    let wrong_kind = scanout_blob(0, 1, (8, 8), rect(0, 0, 8, 8));
    assert_eq!(
        machine.command(VIRTIO_GPU_CMD_SET_SCANOUT_BLOB, &wrong_kind),
        NO_RESOURCE
    );

    assert_eq!(
        machine.command(VIRTIO_GPU_CMD_GET_EDID, &[16u8, 0, 0, 0, 0, 0, 0, 0]),
        VIRTIO_GPU_RESP_ERR_INVALID_SCANOUT_ID
    );
    assert_eq!(machine.command(VIRTIO_GPU_CMD_GET_EDID, &[0u8; 7]), BAD);
    assert_eq!(
        machine.command(VIRTIO_GPU_CMD_GET_CAPSET_INFO, &[0u8; 8]),
        BAD
    );
    for unknown in [0, 0x10e, 0x200, 0x209, 0x300, u32::MAX] {
        assert_eq!(
            machine.command(unknown, &[0u8; 64]),
            VIRTIO_GPU_RESP_ERR_UNSPEC
        );
    }
}

#[test]
fn requests_without_sense_are_answered_as_far_as_there_is_room() {
    let mut machine = machine();
    // Too short for a header, without room for an answer, with room for a part of it.
    let written = machine
        .driver
        .request(0, &[(REQUEST, 10, 0), (RESPONSE, 64, WRITE)]);
    let (answer, _) = machine.response(written);
    assert_eq!(answer.type_.get(), VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER);
    let get = header(VIRTIO_GPU_CMD_GET_DISPLAY_INFO, None);
    let len = machine.prepare(get, &[]);
    assert_eq!(machine.driver.request(0, &[(REQUEST, len, 0)]), 0);
    let chain = [(REQUEST, len, 0), (RESPONSE, 30, WRITE)];
    assert_eq!(machine.driver.request(0, &chain), 30);
    // In pieces.
    let chain = [
        (REQUEST, 5, 0),
        (REQUEST + 5, len - 5, 0),
        (RESPONSE, 4096, WRITE),
    ];
    assert_eq!(machine.driver.request(0, &chain), 24 + 384);
    assert!(!machine.driver.status.needs_reset());
}

#[test]
fn what_was_not_negotiated_is_not_there() {
    let mut machine = machine_with(0);
    for command in [
        VIRTIO_GPU_CMD_GET_EDID,
        VIRTIO_GPU_CMD_RESOURCE_ASSIGN_UUID,
        VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB,
        VIRTIO_GPU_CMD_SET_SCANOUT_BLOB,
    ] {
        assert_eq!(
            machine.command(command, &[0u8; 72]),
            VIRTIO_GPU_RESP_ERR_UNSPEC
        );
    }
}

#[test]
fn host_memory_is_bounded_and_comes_back() {
    let mut machine = machine();
    let mut id = 0;
    let full = loop {
        id += 1;
        match machine.create_2d(id, 1024, 1024) {
            VIRTIO_GPU_RESP_OK_NODATA => {}
            error => break error,
        }
    };
    assert_eq!(full, VIRTIO_GPU_RESP_ERR_OUT_OF_MEMORY);
    assert_eq!(id, 16);
    let used = machine.display.statistics().resource_memory;
    assert!(used <= BUDGET && used > BUDGET - (5 << 20));
    machine.gpu.reset();
    assert_eq!(machine.display.statistics().resource_memory, 0);
}

#[test]
fn uuids_stay() {
    let mut machine = machine();
    machine.create_2d(1, 8, 8);
    let mut assign = || {
        let header = header(VIRTIO_GPU_CMD_RESOURCE_ASSIGN_UUID, None);
        let (answer, body) = machine.on_queue(CONTROL_QUEUE, header, &[1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(answer.type_.get(), VIRTIO_GPU_RESP_OK_RESOURCE_UUID);
        body
    };
    let first = assign();
    assert_eq!(first.len(), 16);
    assert_eq!(first[6] >> 4, 4);
    assert_eq!(assign(), first);
}

#[test]
fn a_reset_forgets_everything_and_the_next_driver_starts_clean() {
    let mut machine = machine();
    machine.create_blob(1, 0x4000, &[(PIXELS, 0x4000)]);
    let command = scanout_blob(0, 1, (64, 64), rect(0, 0, 64, 64));
    machine.ok(VIRTIO_GPU_CMD_SET_SCANOUT_BLOB, &command);
    let watcher = machine.display.subscribe(true).unwrap();
    watcher.events();
    machine.gpu.reset();
    machine.gpu.reset();
    assert!(matches!(
        watcher.events()[..],
        [DisplayEvent::Scanout {
            output: 0,
            frame: None,
            gone: false
        }]
    ));
    machine
        .display
        .set_output(0, Some(mode(1000, 500)))
        .unwrap();
    assert_eq!(machine.display.outputs()[0].output.mode, mode(1000, 500));
}

/// A command of any kind, most of them with numbers that make sense.
fn any_command() -> impl Strategy<Value = Vec<u8>> {
    let small = || prop_oneof![8 => 0u32..6, 4 => 0u32..70, 1 => any::<u32>()];
    let types = prop_oneof![
        9 => 0x100u32..0x10e,
        1 => Just(0x300u32),
        1 => any::<u32>(),
    ];
    let word = prop_oneof![
        6 => small(),
        2 => Just(PIXELS as u32),
        2 => Just(0x1000u32),
        1 => Just(XRGB),
    ];
    (types, any::<bool>(), prop::collection::vec(word, 0..24)).prop_map(|(type_, fence, words)| {
        let mut bytes = header(type_, fence.then_some(1)).as_bytes().to_vec();
        for word in words {
            bytes.extend(word.to_le_bytes());
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..Default::default() })]

    /// Whatever is sent is answered, and what the guest holds stays within its bound.
    #[test]
    fn any_commands_are_survived(commands in prop::collection::vec((any_command(), 0u16..2), 1..60)) {
        let mut machine = machine();
        for (command, queue) in commands {
            machine.driver.write(REQUEST, &command);
            let chain = [(REQUEST, command.len() as u32, 0), (RESPONSE, 4096, WRITE)];
            let written = machine.driver.request(queue.into(), &chain);
            let (answer, _) = machine.response(written);
            prop_assert!((0x1100..0x1206).contains(&answer.type_.get()));
            for output in 0..OUTPUTS {
                let _ = machine.display.read_scanout(output);
            }
            prop_assert!(machine.display.statistics().resource_memory <= BUDGET);
        }
        prop_assert!(!machine.driver.status.needs_reset());
        machine.gpu.reset();
        prop_assert_eq!(machine.display.statistics().resource_memory, 0);
    }
}
