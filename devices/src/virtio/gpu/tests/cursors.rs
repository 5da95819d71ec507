//! Cursors, and the queue that they come on.

use super::*;

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
fn a_driver_without_cursors_needs_no_queue_for_them() {
    let ram = GuestRam::new(64 << 20, None).unwrap();
    let config = DisplayConfig {
        outputs: vec![mode(640, 480)],
        name: "Test".into(),
        max_resource_memory: BUDGET,
    };
    let display = DisplayHandle::new(config, Arc::new(Exporter::none())).unwrap();
    let mut gpu = Gpu::new(display, Arc::default());
    let driver = Driver::with_memory(2, ram.memory().clone());
    let mut activation = driver.activation_with(ALL);
    activation.queues[1] = None;
    gpu.activate(activation).unwrap();
    let get = header(VIRTIO_GPU_CMD_GET_DISPLAY_INFO, None);
    driver.write(REQUEST, get.as_bytes());
    let before = driver.used_index(0);
    driver.submit(0, &[(REQUEST, 24, 0), (RESPONSE, 4096, WRITE)]);
    driver.wait(|driver| driver.used_index(0) != before);
    gpu.reset();
    let mut activation = driver.activation_with(ALL);
    activation.queues[0] = None;
    assert!(gpu.activate(activation).is_err(), "without a control queue");
}
