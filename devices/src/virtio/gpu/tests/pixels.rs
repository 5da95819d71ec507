//! What the driver draws is what the host sees.

use super::*;
use crate::memory::{Backing, BackingKind};

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
    // Two transfers and two pictures.
    let (transferred, read) = (width * height + 20, width * height + 8 * 8);
    let copied = u64::from(transferred + read) * 4;
    assert_eq!(machine.display.statistics().copied_bytes, copied);

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
    let pictures = 2 * 32 * 16 * 4;
    assert_eq!(machine.display.statistics().copied_bytes, pictures);
}

/// A file stands for the BAR of a device: the first half of the path is the same.
#[test]
fn what_is_shown_goes_and_comes_with_the_devices_memory() {
    const BAR: u64 = 0x1_0000_0000;
    let mut machine = machine();
    let map = machine.map.clone();
    let file = Arc::new(tempfile::tempfile().unwrap());
    std::os::unix::fs::FileExt::write_all_at(&*file, &[7; 0x4000], 0).unwrap();
    let insert = |region| {
        let kind = BackingKind::Bar {
            device: 0,
            region,
            start: 0,
        };
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
fn without_dma_bufs_there_are_copies() {
    use std::{fs::File, os::unix::fs::FileExt};

    let mut machine = machine_of(ALL, Exporter::none());
    machine.create_blob(1, 0x4000, &[(PIXELS, 0x4000)]);
    machine.driver.write(PIXELS, &pattern(64, 64));
    let show = |machine: &mut Machine, r| {
        let command = scanout_blob(0, 1, (64, 64), r);
        machine.ok(VIRTIO_GPU_CMD_SET_SCANOUT_BLOB, &command);
        machine.display.frame(0).unwrap().unwrap()
    };
    let frame = show(&mut machine, rect(8, 4, 32, 16));
    assert!(matches!(
        machine.display.export(&frame),
        Err(FrameError::Export(_))
    ));
    let mut copy = machine.display.copy(frame).unwrap();
    let image = copy.image().unwrap();
    assert_eq!(
        (image.memory, image.location, image.stride),
        (FrameMemory::Shared, Location::Host, 128)
    );
    let file = File::from(image.fd);
    let pixel = |x: u64, y: u64| {
        let mut pixel = [0; 4];
        file.read_exact_at(&mut pixel, (y * 32 + x) * 4).unwrap();
        [pixel[0], pixel[1]]
    };
    assert_eq!((pixel(0, 0), pixel(31, 15)), ([8, 4], [39, 19]));
    assert!(file.write_at(&[0], 0).is_err() && file.set_len(0).is_err());

    machine.driver.write(PIXELS, &[0xee; 0x4000]);
    let area = |x, y, width, height| Area {
        x,
        y,
        width,
        height,
    };
    // What lies outside is left out.
    copy.update(&[area(1, 2, 1, 1), area(30, 15, 1000, 1000)])
        .unwrap();
    assert_eq!((pixel(1, 2), pixel(31, 15)), ([0xee; 2], [0xee; 2]));
    assert_eq!((pixel(0, 2), pixel(2, 2)), ([8, 6], [10, 6]));

    let moved = show(&mut machine, rect(0, 0, 32, 16));
    copy.replace(&moved).unwrap().unwrap();
    assert_eq!(pixel(0, 0), [0xee; 2]);
    let larger = show(&mut machine, rect(0, 0, 64, 16));
    assert!(copy.replace(&larger).is_none());
}

#[test]
fn copies_are_bounded() {
    let mut machine = machine_of(ALL, Exporter::none());
    machine.create_2d(1, 2048, 2048);
    machine.set_scanout(0, 1, rect(0, 0, 2048, 2048));
    let frame = machine.display.frame(0).unwrap().unwrap();
    let quota = crate::memory::Quota::new(40 << 20);
    let copy = |frame: &Frame| FrameCopy::new(frame.clone(), &quota);
    let first = [copy(&frame).unwrap(), copy(&frame).unwrap()];
    assert!(matches!(
        copy(&frame),
        Err(FrameError::TooManyCopies { .. })
    ));
    drop(first);
    assert!(copy(&frame).is_ok());
}
