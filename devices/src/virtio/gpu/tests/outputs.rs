//! Outputs as the driver sees them and as the host changes them.

use super::*;

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
