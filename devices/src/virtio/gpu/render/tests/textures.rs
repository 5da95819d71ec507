//! Textures on outputs.

use super::*;

#[test]
fn a_texture_on_an_output_is_read_back() {
    let mut m = machine();
    assert_eq!(m.create_3d(3, 2), OK);
    let show = |r| SetScanout {
        r,
        scanout_id: 0.into(),
        resource_id: 3.into(),
    };
    let set = VIRTIO_GPU_CMD_SET_SCANOUT;
    assert_eq!(
        m.command(set, &show(rect(1, 0, 64, 64))),
        VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER
    );
    assert_eq!(m.command(set, &show(rect(0, 0, 64, 64))), OK);
    let flush = |r| ResourceFlush {
        r,
        resource_id: 3.into(),
        padding: 0.into(),
    };
    let type_ = VIRTIO_GPU_CMD_RESOURCE_FLUSH;
    assert_eq!(m.command(type_, &flush(rect(8, 8, 4, 4))), OK);
    assert_eq!(m.display.statistics().copied_bytes, 4 * 4 * 4);
    let pixels = m.display.read_scanout(0).unwrap();
    assert_eq!(pixels.rgba(8, 8), Some([0x40; 4]));
    assert_eq!(pixels.rgba(7, 8), Some([0; 4]));
    assert_eq!(pixels.rgba(11, 11), Some([0x40; 4]));
    assert_eq!(pixels.rgba(12, 11), Some([0; 4]));
    assert!(m.display.statistics().resource_memory > 64 * 64 * 4);
    assert_eq!(
        m.command(type_, &flush(rect(8, 8, 64, 4))),
        VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER
    );
    assert_eq!(m.command(VIRTIO_GPU_CMD_RESOURCE_UNREF, &resource(3)), OK);
    assert!(m.display.read_scanout(0).is_err());
    assert_eq!(m.display.statistics().resource_memory, 0);
}

#[test]
fn a_texture_s_own_memory_is_shown() {
    let mut m = machine();
    let set = |id: u32| SetScanout {
        r: rect(0, 0, 64, 64),
        scanout_id: 0.into(),
        resource_id: id.into(),
    };
    let show = VIRTIO_GPU_CMD_SET_SCANOUT;
    let flush = ResourceFlush {
        r: rect(8, 8, 40, 40),
        resource_id: 4.into(),
        padding: 0.into(),
    };
    // Of the next one the memory ends before the last pixel.
    for id in [4, 6] {
        assert_eq!(m.create_3d(id, 2), OK);
        for _ in 0..2 {
            assert_eq!(m.command(show, &set(id)), OK);
        }
        let flush = ResourceFlush {
            resource_id: id.into(),
            ..flush
        };
        let before = m.display.statistics().copied_bytes;
        assert_eq!(m.command(VIRTIO_GPU_CMD_RESOURCE_FLUSH, &flush), OK);
        let copied = m.display.statistics().copied_bytes - before;
        assert_eq!(copied, if id == 4 { 0 } else { 40 * 40 * 4 });
        let pixels = m.display.read_scanout(0).unwrap();
        let [own, copied] = [[4, 2, 3, 4], [0x40; 4]];
        assert_eq!(
            pixels.rgba(40, 40),
            Some(if id == 4 { own } else { copied })
        );
    }
    assert_eq!(m.fake.calls_of(REQUEST_EXPORT_TEXTURE), 2);
    assert_eq!(m.fake.calls_of(REQUEST_READ_BACK), 2);
    m.fake.kill();
    assert_eq!(m.command(show, &set(4)), OK);
    assert_eq!(m.display.read_scanout(0).unwrap().rgba(0, 0).unwrap()[0], 4);
}
