//! Blobs of the renderer: in the region that the guest sees, and on outputs.

use proptest::prelude::*;

use super::*;
use crate::virtio::gpu::render::blob_files::MOST;

#[test]
fn a_blob_s_memory_is_not_asked_for_while_it_is_at_hand() {
    let mut m = machine();
    m.create_context();
    let create = VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB;
    let unmap = VIRTIO_GPU_CMD_RESOURCE_UNMAP_BLOB;
    for id in [1, 3] {
        assert_eq!(m.command(create, &blob(id, 1)), OK);
    }
    for _ in 0..2 {
        assert_eq!(m.map(3, PAGE), VIRTIO_GPU_RESP_OK_MAP_INFO);
        assert_eq!(m.map(1, 0), VIRTIO_GPU_RESP_OK_MAP_INFO);
        assert_eq!([m.seen(0), m.seen(1)], [Some(1), Some(3)]);
        assert_eq!(m.command(unmap, &resource(3)), OK);
        assert_eq!(m.command(unmap, &resource(1)), OK);
    }
    assert_eq!(m.fake.calls_of(REQUEST_EXPORT), 0);
    // Those that came before many others are asked for, once. Every other one comes with its memory.
    let others = 100..100 + 2 * MOST as u32;
    for id in others {
        assert_eq!(m.command(create, &blob(id, 1)), OK);
    }
    for _ in 0..2 {
        assert_eq!(m.map(1, 0), VIRTIO_GPU_RESP_OK_MAP_INFO);
        assert_eq!(m.seen(0), Some(1));
        assert_eq!(m.command(unmap, &resource(1)), OK);
    }
    assert_eq!(m.fake.calls_of(REQUEST_EXPORT), 1);
    // Another one of the same number is another one.
    let unref = VIRTIO_GPU_CMD_RESOURCE_UNREF;
    assert_eq!(m.command(unref, &resource(1)), OK);
    assert_eq!(m.map(1, 0), VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID);
    assert_eq!(m.command(create, &blob(1, 2)), OK);
    assert_eq!(m.map(1, 0), VIRTIO_GPU_RESP_OK_MAP_INFO);
    assert_eq!([m.seen(0), m.seen(1)], [Some(1), Some(1)]);
}

#[test]
fn blobs_are_shown_where_they_may() {
    let mut m = machine();
    m.create_context();
    let create = VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB;
    assert_eq!(m.command(create, &blob(1, 2)), OK);
    assert_eq!(m.command(create, &blob(2, 1)), OK);
    // Longer than what the renderer gives.
    assert_eq!(m.command(create, &blob(3, 3)), OK);
    for size in [0, 100] {
        let bad = ResourceCreateBlob {
            size: size.into(),
            ..blob(9, 0)
        };
        assert_eq!(
            m.command(create, &bad),
            VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER
        );
    }
    let bad = VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER;
    for offset in [1, (PAGES - 1) * PAGE, PAGES * PAGE, u64::MAX - PAGE + 1] {
        assert_eq!(m.map(1, offset), bad, "{offset:#x}");
    }
    assert_eq!(m.map(3, 0), bad);
    assert_eq!(m.map(1, 0), VIRTIO_GPU_RESP_OK_MAP_INFO);
    assert_eq!(m.map(1, 8 * PAGE), VIRTIO_GPU_RESP_ERR_UNSPEC);
    assert_eq!(m.map(2, PAGE), bad);
    assert_eq!(m.map(2, 4 * PAGE), VIRTIO_GPU_RESP_OK_MAP_INFO);
    assert_eq!([m.seen(0), m.seen(1), m.seen(2)], [Some(1), Some(1), None]);
    assert_eq!(m.seen(4), Some(2));
    let unmap = VIRTIO_GPU_CMD_RESOURCE_UNMAP_BLOB;
    assert_eq!(m.command(unmap, &resource(2)), OK);
    assert_eq!(m.command(unmap, &resource(2)), VIRTIO_GPU_RESP_ERR_UNSPEC);
    assert_eq!(m.seen(4), None);
    // A blob that is destroyed is no longer visible.
    let unref = VIRTIO_GPU_CMD_RESOURCE_UNREF;
    assert_eq!(m.command(unref, &resource(1)), OK);
    assert_eq!(m.seen(0), None);
    assert_eq!(m.map(2, 0), VIRTIO_GPU_RESP_OK_MAP_INFO);
    m.gpu.reset();
    assert_eq!(m.seen(0), None);
    m.activate();
    assert_eq!(m.map(2, 0), VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID);
}

#[test]
fn outputs_show_the_renderer_s_blobs() {
    let mut m = machine();
    m.create_context();
    let create = VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB;
    let set = |id: u32, height: u32| SetScanoutBlob {
        r: rect(0, 0, 64, height),
        resource_id: id.into(),
        width: 64.into(),
        height: height.into(),
        format: 2.into(),
        strides: [256.into(), 0.into(), 0.into(), 0.into()],
        ..Default::default()
    };
    let show = VIRTIO_GPU_CMD_SET_SCANOUT_BLOB;
    for id in [2, 3] {
        assert_eq!(m.command(create, &blob(id, 2)), OK);
        assert_eq!(
            m.command(show, &set(id, 33)),
            VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER
        );
        assert_eq!(m.command(show, &set(id, 32)), OK);
        let pixels = m.display.read_scanout(0).unwrap();
        assert_eq!(pixels.rgba(63, 31).map(|p| p[0]), Some(id as u8));
    }
    assert_eq!(m.fake.calls_of(REQUEST_EXPORT), 1);
    // The file is shorter.
    assert_eq!(m.command(create, &blob(4, 3)), OK);
    assert_eq!(m.command(show, &set(4, 32)), VIRTIO_GPU_RESP_ERR_UNSPEC);
    assert_eq!(m.create_3d(5, 2), OK);
    let answer = m.command(show, &set(5, 32));
    assert_eq!(answer, VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID);
    assert_eq!(m.command(VIRTIO_GPU_CMD_RESOURCE_UNREF, &resource(3)), OK);
    assert!(m.display.read_scanout(0).is_err());
}

#[derive(Clone, Debug)]
enum Step {
    Create(u32, u64, bool),
    Map(u32, u64),
    Unmap(u32),
    Unref(u32),
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let id = 1..5_u32;
    prop_oneof![
        4 => (id.clone(), 1..3_u64, any::<bool>())
            .prop_map(|(id, pages, shared)| Step::Create(id, pages, shared)),
        6 => (id.clone(), 0..PAGES + 1).prop_map(|(id, page)| Step::Map(id, page)),
        3 => id.clone().prop_map(Step::Unmap),
        2 => id.prop_map(Step::Unref),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// The driver sees of each page the blob that it has put there, and nothing else; devices see those that are shared.
    #[test]
    fn the_region_is_what_the_driver_put_there(steps in prop::collection::vec(step(), 1..40)) {
        let mut m = machine();
        m.create_context();
        // Pages, whether it is shared, and the first page of those that are shown.
        let mut blobs = std::collections::BTreeMap::<u32, (u64, bool, Option<u64>)>::new();
        for step in steps {
            match step {
                Step::Create(id, pages, shared) => {
                    let mut command = blob(id, pages);
                    if shared {
                        command.blob_flags = VIRTIO_GPU_BLOB_FLAGS.into();
                    }
                    let answer = m.command(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, &command);
                    prop_assert_eq!(answer == OK, !blobs.contains_key(&id));
                    blobs.entry(id).or_insert((pages, shared, None));
                }
                Step::Map(id, page) => {
                    let answer = m.map(id, page * PAGE);
                    let free = blobs.get(&id).is_some_and(|&(pages, _, at)| {
                        at.is_none()
                            && page + pages <= PAGES
                            && !blobs.values().any(|&(others, _, at)| {
                                at.is_some_and(|at| at < page + pages && page < at + others)
                            })
                    });
                    prop_assert_eq!(answer == VIRTIO_GPU_RESP_OK_MAP_INFO, free);
                    if free {
                        blobs.entry(id).and_modify(|blob| blob.2 = Some(page));
                    }
                }
                Step::Unmap(id) => {
                    let answer = m.command(VIRTIO_GPU_CMD_RESOURCE_UNMAP_BLOB, &resource(id));
                    let shown = blobs.get_mut(&id).and_then(|blob| blob.2.take());
                    prop_assert_eq!(answer == OK, shown.is_some());
                }
                Step::Unref(id) => {
                    let answer = m.command(VIRTIO_GPU_CMD_RESOURCE_UNREF, &resource(id));
                    prop_assert_eq!(answer == OK, blobs.remove(&id).is_some());
                }
                Step::Reset => {
                    m.gpu.reset();
                    blobs.clear();
                    m.activate();
                    m.create_context();
                }
            }
            for page in 0..PAGES {
                let there = blobs.iter().find(|(_, (pages, _, at))| {
                    at.is_some_and(|at| (at..at + pages).contains(&page))
                });
                prop_assert_eq!(m.seen(page), there.map(|(&id, _)| id as u8));
            }
            let shared = blobs.values().filter(|blob| blob.1);
            let mut reached: Vec<_> = shared
                .filter_map(|&(pages, _, at)| Some((REGION + at? * PAGE, pages * PAGE)))
                .collect();
            reached.sort_unstable();
            prop_assert_eq!(m.reached.mapped(), reached);
        }
    }
}
