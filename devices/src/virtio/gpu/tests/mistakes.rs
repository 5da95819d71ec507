//! What the driver must not do, and what becomes of it.

use super::*;

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
