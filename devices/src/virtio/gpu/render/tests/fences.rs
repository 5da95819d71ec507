//! Commands that are answered when their fence has passed.

use super::*;

#[test]
fn answers_wait_for_their_fences_in_order() {
    let mut m = machine();
    m.create_context();
    m.fake.0.lock().keeps_fences = true;
    let sync = header(VIRTIO_GPU_CMD_SUBMIT_3D, 7);
    let ring = CtrlHdr {
        flags: VIRTIO_GPU_FLAG_INFO_RING_IDX.into(),
        ring_idx: 3,
        ..sync
    };
    // The last is of 2D, and behind the first all the same.
    let info = header(VIRTIO_GPU_CMD_GET_DISPLAY_INFO, 0);
    let before = m.driver.used_index(0);
    m.submit_fenced(&[sync, ring, info]);
    m.wait_calls(REQUEST_FENCE, 1);
    assert_eq!(m.driver.used_index(0), before);
    let fence = |number, of_ring: u32| FencePosition {
        of_ring,
        context: 7 * of_ring,
        ring: 3 * of_ring,
        number,
    };
    assert_eq!(m.fake.last_fence(), fence(3, 0));
    m.fake.pass(fence(2, 1));
    m.driver.wait(|d| d.used_index(0) == before.wrapping_add(1));
    m.fake.pass(fence(3, 0));
    m.driver.wait(|d| d.used_index(0) == before.wrapping_add(3));
    let answer = m.driver.read(RESPONSE + 2 * 4096, 24);
    let answer = CtrlHdr::read_from_bytes(&answer).unwrap();
    assert_eq!(answer.type_.get(), VIRTIO_GPU_RESP_OK_DISPLAY_INFO);
}

#[test]
fn a_fence_says_nothing_about_other_rings() {
    let mut m = machine();
    m.create_context();
    m.fake.0.lock().keeps_fences = true;
    let on_ring = |ring_idx| CtrlHdr {
        flags: VIRTIO_GPU_FLAG_INFO_RING_IDX.into(),
        ring_idx,
        ..header(VIRTIO_GPU_CMD_SUBMIT_3D, 7)
    };
    let before = m.driver.used_index(0);
    m.submit_fenced(&[on_ring(2), on_ring(3)]);
    m.wait_calls(VIRTIO_GPU_CMD_SUBMIT_3D, 2);
    let pass = |ring, number| {
        m.fake.pass(FencePosition {
            of_ring: 1,
            context: 7,
            ring,
            number,
        });
    };
    pass(3, 2);
    m.driver.wait(|d| d.used_index(0) == before.wrapping_add(1));
    pass(2, 1);
    m.driver.wait(|d| d.used_index(0) == before.wrapping_add(2));
    // Chains of two descriptors each: the second command was answered first.
    let order = [0, 1].map(|n| m.driver.used_head(0, before.wrapping_add(n)));
    assert_eq!(order, [2, 0]);
}
