//! Checks streams of any commands against the specification: for fuzzing and for unit tests.
//!
//! A stream is a list of requests, each with two bytes in front: the queue (bit 0) with where the request is
//! cut into descriptors, and its length.

#![allow(missing_docs)]

use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock},
};

use zerocopy::FromBytes;

use super::{device::FEATURES, protocol::*, *};
use crate::{
    dmabuf::Exporter,
    memory::{AddressSpace, GuestRam},
    sync::Mutex,
    virtio::{
        VirtioDevice,
        test_util::{Driver, WRITE},
    },
};

const MEMORY: u64 = 64 << 20;
const BUDGET: u64 = 4 << 20;
const REQUEST: u64 = 0x10_0000;
const RESPONSE: u64 = 0x20_0000;
/// A page that nothing but the driver may write.
const CANARY: u64 = 0x30_0000;
const PAGE: usize = 4096;

/// Made once, for one stream at a time: the guest's memory and its map.
static RAM: LazyLock<Mutex<(GuestRam, Arc<AddressSpace>)>> = LazyLock::new(|| {
    let ram = GuestRam::new(MEMORY, None).expect("guest memory");
    let map = Arc::new(AddressSpace::new());
    ram.insert_into(&map).expect("a map of guest memory");
    Mutex::new((ram, map))
});

/// What is known of a resource.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Known {
    Image { backed: bool },
    Blob { backed: bool },
}

/// What the device must know if it answered as it did.
#[derive(Debug, Default)]
struct Model {
    resources: BTreeMap<u32, Known>,
    scanouts: [Option<u32>; OUTPUTS],
}

impl Model {
    /// Takes a command of the control queue and its answer, which must fit what came before.
    fn control(&mut self, type_: u32, body: &[u8], done: bool) {
        match type_ {
            VIRTIO_GPU_CMD_RESOURCE_CREATE_2D if done => {
                let command = parse::<ResourceCreate2d>(body);
                let sides = [command.width.get(), command.height.get()];
                assert!(sides.iter().all(|side| (1..=Mode::MAX).contains(side)));
                self.add(command.resource_id.get(), Known::Image { backed: false });
            }
            VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB if done => {
                let command = parse::<ResourceCreateBlob>(body);
                assert!(command.size.get() > 0);
                let backed = command.nr_entries.get() > 0;
                self.add(command.resource_id.get(), Known::Blob { backed });
            }
            VIRTIO_GPU_CMD_RESOURCE_UNREF if body.len() >= size_of::<ResourceId>() => {
                let id = parse::<ResourceId>(body).resource_id.get();
                assert_eq!(self.resources.remove(&id).is_some(), done, "unref {id}");
                for scanout in &mut self.scanouts {
                    *scanout = scanout.filter(|&shown| shown != id);
                }
            }
            VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING if done => {
                let id = parse::<ResourceAttachBacking>(body).resource_id.get();
                let backed = self.backed(id).expect("attached to nothing");
                assert!(!*backed, "{id} is attached twice");
                *backed = true;
            }
            VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING if body.len() >= size_of::<ResourceId>() => {
                let id = parse::<ResourceId>(body).resource_id.get();
                let backed = self.backed(id).map(std::mem::take);
                assert_eq!(backed.unwrap_or(false), done, "detach {id}");
            }
            VIRTIO_GPU_CMD_SET_SCANOUT if done => {
                let command = parse::<SetScanout>(body);
                let id = command.resource_id.get();
                let image = matches!(self.resources.get(&id), Some(Known::Image { .. }));
                assert!(id == 0 || image, "{id} is shown as an image");
                self.show(command.scanout_id.get(), id);
            }
            VIRTIO_GPU_CMD_SET_SCANOUT_BLOB if done => {
                let command = parse::<SetScanoutBlob>(body);
                let id = command.resource_id.get();
                let blob = matches!(self.resources.get(&id), Some(Known::Blob { .. }));
                assert!(id == 0 || blob, "{id} is shown as a blob");
                self.show(command.scanout_id.get(), id);
            }
            VIRTIO_GPU_CMD_RESOURCE_FLUSH
            | VIRTIO_GPU_CMD_RESOURCE_ASSIGN_UUID
            | VIRTIO_GPU_CMD_TRANSFER_TO_HOST_2D
                if done =>
            {
                let at = match type_ {
                    VIRTIO_GPU_CMD_RESOURCE_FLUSH => size_of::<Rect>(),
                    VIRTIO_GPU_CMD_TRANSFER_TO_HOST_2D => size_of::<Rect>() + size_of::<u64>(),
                    _ => 0,
                };
                let id = parse::<ResourceId>(&body[at..]).resource_id.get();
                assert!(self.resources.contains_key(&id), "{id} is used");
            }
            _ => {}
        }
    }

    fn add(&mut self, id: u32, known: Known) {
        assert_ne!(id, 0);
        assert_eq!(self.resources.insert(id, known), None, "{id} is made twice");
    }

    fn backed(&mut self, id: u32) -> Option<&mut bool> {
        match self.resources.get_mut(&id)? {
            Known::Image { backed } | Known::Blob { backed } => Some(backed),
        }
    }

    fn show(&mut self, scanout: u32, id: u32) {
        self.scanouts[scanout as usize] = (id != 0).then_some(id);
    }

    /// What the host sees must be what the driver was told.
    fn compare(&self, display: &DisplayHandle) {
        for output in display.outputs() {
            let shown = self.scanouts[output.index];
            assert_eq!(output.shown.is_some(), shown.is_some(), "{}", output.index);
            let lit = shown.is_some_and(|id| self.resources[&id] != Known::Blob { backed: false });
            let frame = display
                .frame(output.index)
                .expect("an output of the device");
            assert_eq!(frame.is_some(), lit, "{}", output.index);
        }
        let used = display.statistics().resource_memory;
        assert!(used <= BUDGET);
        assert_eq!(used == 0, self.resources.is_empty());
    }
}

fn parse<T: FromBytes>(body: &[u8]) -> T {
    let (value, _) = T::read_from_prefix(body).expect("a command that is whole was answered so");
    value
}

/// Has a device of its own answer a stream. Panics if something is not as it must be.
pub fn check(mut stream: &[u8]) {
    let memory = RAM.lock();
    let (ram, map) = &*memory;
    let config = DisplayConfig {
        outputs: vec![Mode::DEFAULT],
        name: "Stream".into(),
        max_resource_memory: BUDGET,
    };
    let display = DisplayHandle::new(config, Arc::new(Exporter::open())).expect("a display");
    let watcher = display.subscribe(false).expect("a watcher");
    let mut gpu = Gpu::new(display.clone(), map.clone());
    let mut driver = Driver::with_memory(2, ram.memory().clone());
    let canary: Vec<u8> = (0..PAGE).map(|at| (at * 7) as u8).collect();
    driver.write(CANARY, &canary);
    gpu.activate(driver.activation_with(FEATURES))
        .expect("a device");
    let mut model = Model::default();
    while let [how, len, rest @ ..] = stream {
        let (request, rest) = rest.split_at(usize::from(*len).min(rest.len()));
        stream = rest;
        driver.write(REQUEST, request);
        let cut = (usize::from(how >> 1) % 64).min(request.len()) as u32;
        let rest = request.len() as u32 - cut;
        let chain = [
            (REQUEST, cut, 0),
            (REQUEST + u64::from(cut), rest, 0),
            (RESPONSE, PAGE as u32, WRITE),
        ];
        let queue = u16::from(how & 1);
        let written = driver.request(queue.into(), &chain);
        assert!((size_of::<CtrlHdr>()..=PAGE).contains(&(written as usize)));
        let answer = parse::<CtrlHdr>(&driver.read(RESPONSE, written as usize));
        assert!((0x1100..0x1206).contains(&answer.type_.get()));
        let done = answer.type_.get() < VIRTIO_GPU_RESP_ERR_UNSPEC;
        let Ok((header, body)) = CtrlHdr::read_from_prefix(request) else {
            assert!(!done);
            continue;
        };
        let repeated = VIRTIO_GPU_FLAG_FENCE | VIRTIO_GPU_FLAG_INFO_RING_IDX;
        assert_eq!(answer.flags.get(), header.flags.get() & repeated);
        assert_eq!(answer.fence_id, header.fence_id);
        if queue == CONTROL_QUEUE {
            model.control(header.type_.get(), body, done);
        }
        model.compare(&display);
    }
    for output in 0..OUTPUTS {
        match display.read_scanout(output) {
            Ok(_) | Err(DisplayError::Dark(_)) => {}
            Err(error) => panic!("output {output}: {}", crate::error_line(&error)),
        }
        let _ = display.export_scanout(output);
    }
    drop(watcher.events());
    assert!(!driver.status.needs_reset());
    assert_eq!(driver.read(CANARY, PAGE), canary, "the device wrote there");
    gpu.reset();
    Model::default().compare(&display);
}
