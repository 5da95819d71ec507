//! The device with a renderer in a thread of the test: its requests, and the responses of the driver.

use std::{
    fs::File,
    io::{self, Write},
    os::{fd::OwnedFd, unix::fs::FileExt},
    sync::{Arc, mpsc},
    thread,
};

use rustix::{
    fs::{MemfdFlags, memfd_create},
    net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair},
};
use virtio_queue::desc::split::Descriptor;
use zerocopy::{FromBytes, Immutable, IntoBytes};

mod blobs;
mod fences;
mod textures;

use super::{super::protocol::*, renderer::MAX_UNANSWERED, wire::*, *};
use crate::{
    dma::{SharedBlobDmaMap, test_util::FakeSpace},
    dmabuf::Exporter,
    hypervisor::test_util::FakeHypervisor,
    memory::{AddressSpace, GuestRam},
    pci::BarHandler,
    sync::Mutex,
    virtio::{
        VirtioDevice,
        gpu::{DisplayConfig, DisplayHandle, Gpu, Mode, tests::rect},
        test_util::{Driver, NEXT, WRITE},
    },
};

const REQUEST: u64 = 0x10_0000;
const RESPONSE: u64 = 0x1f_0000;
const PAGE: u64 = 4096;
const PAGES: u64 = 16;
/// Where the guest has the region.
const REGION: u64 = 0x10_0000_0000;
const OK: u32 = VIRTIO_GPU_RESP_OK_NODATA;

/// What a renderer was asked, and how it answers.
#[derive(Debug, Default)]
struct Script {
    calls: Vec<Request>,
    /// Calls of this kind are not answered.
    silent: Option<u32>,
    /// Fences are not passed by themselves.
    keeps_fences: bool,
    socket: Option<OwnedFd>,
}

#[derive(Clone, Debug, Default)]
struct Fake(Arc<Mutex<Script>>);

impl Fake {
    fn calls_of(&self, what: u32) -> usize {
        let script = self.0.lock();
        script.calls.iter().filter(|c| c.head.what == what).count()
    }

    fn say(&self, say: &Reply) {
        say.send(self.0.lock().socket.as_ref().unwrap()).unwrap();
    }

    fn pass(&self, fence: FencePosition) {
        let mut say = Reply::of(REPLY_FENCE);
        say.head.fence = fence;
        self.say(&say);
    }

    fn last_fence(&self) -> FencePosition {
        self.0.lock().calls.last().unwrap().head.fence
    }

    /// The process is killed.
    fn kill(&self) {
        let socket = self.0.lock().socket.take().unwrap();
        rustix::net::shutdown(&socket, rustix::net::Shutdown::Both).unwrap();
    }
}

impl StartRenderer for Fake {
    fn start(&self) -> io::Result<Connection> {
        let (socket, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let (own, script) = (theirs.try_clone()?, self.0.clone());
        script.lock().socket = Some(theirs);
        let (ended, end) = mpsc::channel::<()>();
        thread::spawn(move || {
            let _ended = ended;
            while let Ok(Some(call)) = Request::receive(&own, RecvFlags::empty()) {
                let mut script = script.lock();
                let say = answer(&call);
                let (silent, fence) = (script.silent == Some(call.head.what), call.head.fence);
                let keeps = script.keeps_fences;
                let unanswered = call.head.unanswered != 0;
                script.calls.push(call);
                drop(script);
                if silent || unanswered {
                    continue;
                }
                if fence.number != 0 && !keeps {
                    let mut passed = Reply::of(REPLY_FENCE);
                    passed.head.fence = fence;
                    let _ = passed.send(&own);
                }
                let _ = say.send(&own);
            }
        });
        Ok(Connection {
            socket,
            process: Box::new(end),
        })
    }
}

/// Blobs are a page of their number; textures are of one colour.
fn answer(call: &Request) -> Reply {
    let mut say = Reply::of(REPLY_DONE);
    say.head.fence = call.head.fence;
    match call.head.what {
        REQUEST_EXPORT => {
            let id = ResourceId::read_from_bytes(&call.body).unwrap();
            give_memory(&mut say, id.resource_id.get());
        }
        // Of others it is asked for.
        VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB => {
            let command = ResourceCreateBlob::read_from_bytes(&call.body).unwrap();
            let id = command.resource_id.get();
            if !id.is_multiple_of(2) {
                give_memory(&mut say, id);
            }
        }
        // Of others it cannot be had.
        REQUEST_EXPORT_TEXTURE => {
            let id = ResourceId::read_from_bytes(&call.body).unwrap();
            let id = id.resource_id.get();
            if id.is_multiple_of(2) {
                let file = File::from(memfd_create("texture", MemfdFlags::CLOEXEC).unwrap());
                let pixels = [id as u8, 2, 3, 4].repeat(64 * 64);
                (&file).write_all(&pixels).unwrap();
                say.file = Some(file);
                let layout = TextureLayout {
                    fourcc: u32::from_le_bytes(*b"AB24"),
                    stride: 256,
                    offset: if id == 6 { 1 } else { 0 },
                };
                say.data = layout.as_bytes().into();
            }
        }
        REQUEST_READ_BACK => {
            let command = ReadBack::read_from_bytes(&call.body).unwrap();
            let file = call.file.as_ref().unwrap();
            let row = vec![0x40; command.width as usize * 4];
            for y in 0..u64::from(command.height) {
                let at = command.offset + y * u64::from(command.stride);
                file.write_all_at(&row, at).unwrap();
            }
        }
        VIRTIO_GPU_CMD_GET_CAPSET => say.data = b"capset".into(),
        VIRTIO_GPU_CMD_RESOURCE_CREATE_3D => {
            let command = ResourceCreate3d::read_from_bytes(&call.body).unwrap();
            say.head.failed = u32::from(command.target.get() == 99);
        }
        _ => {}
    }
    say
}

fn give_memory(say: &mut Reply, id: u32) {
    let mut file = File::from(memfd_create("blob", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(&[id as u8; 2 * PAGE as usize]).unwrap();
    say.file = Some(file);
    say.head.value = 1;
}

struct Machine {
    driver: Driver,
    gpu: Gpu,
    display: DisplayHandle,
    fake: Fake,
    arena: u64,
    /// What passed-through devices reach.
    reached: Arc<FakeSpace>,
}

fn machine() -> Machine {
    let ram = GuestRam::new(64 << 20, None).unwrap();
    let map = Arc::new(AddressSpace::new());
    ram.insert_into(&map).unwrap();
    let config = DisplayConfig {
        outputs: vec![Mode {
            width: 64,
            height: 64,
        }],
        name: "Test".into(),
        max_resource_memory: 1 << 20,
    };
    let display = DisplayHandle::new(config, Arc::new(Exporter::none())).unwrap();
    let fake = Fake::default();
    let (reach, reached) = (
        Arc::<SharedBlobDmaMap>::default(),
        Arc::new(FakeSpace::default()),
    );
    reach.attach(reached.clone());
    let hypervisor = Arc::new(FakeHypervisor::default());
    let memory = HostMemory::new(PAGES * PAGE, false, hypervisor, reach).unwrap();
    memory.mapped(Some(REGION));
    let crate::pci::BarContent::Memory { ranges, .. } = memory.shared_memory().unwrap().content
    else {
        panic!("no memory");
    };
    let capset = |id| CapsetInfo {
        id,
        max_version: 1,
        max_size: 6,
    };
    let gpu = Gpu::new(display.clone(), map).with_renderer(Rendering {
        starter: Arc::new(fake.clone()),
        capsets: vec![capset(1), capset(4)],
        memory,
    });
    let mut machine = Machine {
        driver: Driver::with_memory(2, ram.memory().clone()),
        arena: ranges[0].host,
        gpu,
        display,
        fake,
        reached,
    };
    machine.activate();
    machine
}

fn blob(id: u32, pages: u64) -> ResourceCreateBlob {
    ResourceCreateBlob {
        resource_id: id.into(),
        blob_mem: VIRTIO_GPU_BLOB_MEM_HOST3D.into(),
        blob_flags: VIRTIO_GPU_BLOB_FLAG_USE_MAPPABLE.into(),
        size: (pages * PAGE).into(),
        ..Default::default()
    }
}

fn resource(id: u32) -> ResourceId {
    ResourceId {
        resource_id: id.into(),
        padding: 0.into(),
    }
}

fn header(type_: u32, context: u32) -> CtrlHdr {
    CtrlHdr {
        type_: type_.into(),
        ctx_id: context.into(),
        ..Default::default()
    }
}

impl Machine {
    fn activate(&mut self) {
        let features = self.gpu.features();
        self.driver.clear_rings(0);
        let activation = self.driver.activation_with(features);
        self.gpu.activate(activation).unwrap();
    }

    fn send(&mut self, header: CtrlHdr, body: &[u8]) -> (u32, Vec<u8>) {
        let request = [header.as_bytes(), body].concat();
        self.driver.write(REQUEST, &request);
        let chain = [(REQUEST, request.len() as u32, 0), (RESPONSE, 4096, WRITE)];
        let written = self.driver.request(0, &chain);
        let bytes = self.driver.read(RESPONSE, written as usize);
        let (header, rest) = CtrlHdr::read_from_prefix(&bytes).unwrap();
        (header.type_.get(), rest.to_vec())
    }

    fn command(&mut self, type_: u32, body: &(impl IntoBytes + Immutable)) -> u32 {
        self.send(header(type_, 7), body.as_bytes()).0
    }

    fn create_context(&mut self) {
        let command = CtxCreate {
            context_init: 4.into(),
            ..Default::default()
        };
        assert_eq!(self.command(VIRTIO_GPU_CMD_CTX_CREATE, &command), OK);
    }

    fn map(&mut self, id: u32, offset: u64) -> u32 {
        let command = ResourceMapBlob {
            resource_id: id.into(),
            padding: 0.into(),
            offset: offset.into(),
        };
        self.command(VIRTIO_GPU_CMD_RESOURCE_MAP_BLOB, &command)
    }

    fn create_3d(&mut self, id: u32, target: u32) -> u32 {
        let command = ResourceCreate3d {
            resource_id: id.into(),
            target: target.into(),
            format: 1.into(),
            width: 64.into(),
            height: 64.into(),
            ..Default::default()
        };
        self.command(VIRTIO_GPU_CMD_RESOURCE_CREATE_3D, &command)
    }

    /// A byte of a page of the region, as the guest sees it.
    fn seen(&self, page: u64) -> Option<u8> {
        let mut byte = 0_u8;
        let part = |base: *mut u8| libc::iovec {
            iov_base: base.cast(),
            iov_len: 1,
        };
        let local = part(&mut byte);
        let remote = part(std::ptr::without_provenance_mut(
            (self.arena + page * PAGE) as usize,
        ));
        // SAFETY: writes one byte to `byte`; an address that cannot be read is an error.
        let read = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
        (read == 1).then_some(byte)
    }

    /// Submits fenced commands one behind the other, without waiting; each is a header alone.
    fn submit_fenced(&self, headers: &[CtrlHdr]) {
        let mut descriptors = Vec::new();
        for (index, header) in (0_u16..).zip(headers) {
            let header = CtrlHdr {
                flags: (header.flags.get() | VIRTIO_GPU_FLAG_FENCE).into(),
                ..*header
            };
            let at = REQUEST + u64::from(index) * 256;
            self.driver
                .write(at, &[header.as_bytes(), &[0; 72]].concat());
            descriptors.push(Descriptor::new(at, 96, NEXT, index * 2 + 1));
            let to = RESPONSE + u64::from(index) * 4096;
            descriptors.push(Descriptor::new(to, 4096, WRITE, 0));
        }
        self.driver.set_descriptors(0, &descriptors);
        for index in 0..headers.len() as u16 {
            self.driver.kick(0, index * 2);
        }
    }

    fn wait_calls(&self, what: u32, count: usize) {
        self.driver.wait(|_| self.fake.calls_of(what) == count);
    }
}

#[test]
fn capability_sets_are_listed_and_read() {
    let mut m = machine();
    let mut config = [0; 20];
    m.gpu.read_config(0, &mut config);
    assert_eq!(config[12], 2);
    let info = |index: u32| GetCapsetInfo {
        capset_index: index.into(),
        padding: 0.into(),
    };
    let get = VIRTIO_GPU_CMD_GET_CAPSET_INFO;
    let (type_, body) = m.send(header(get, 0), info(1).as_bytes());
    assert_eq!((type_, body[0]), (VIRTIO_GPU_RESP_OK_CAPSET_INFO, 4));
    assert_eq!(
        m.command(get, &info(2)),
        VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER
    );
    let capset = |id: u32, version: u32| GetCapset {
        capset_id: id.into(),
        capset_version: version.into(),
    };
    let get = VIRTIO_GPU_CMD_GET_CAPSET;
    let (type_, body) = m.send(header(get, 0), capset(4, 1).as_bytes());
    assert_eq!(
        (type_, &*body),
        (VIRTIO_GPU_RESP_OK_CAPSET, b"capset".as_slice())
    );
    for bad in [capset(2, 0), capset(4, 2)] {
        assert_eq!(m.command(get, &bad), VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER);
    }
}

#[test]
fn streams_go_to_contexts_as_ranges_of_ram() {
    let mut m = machine();
    let submit = |size: u32| CmdSubmit {
        size: size.into(),
        padding: 0.into(),
    };
    let type_ = VIRTIO_GPU_CMD_SUBMIT_3D;
    let stream = |size: u32| [submit(size).as_bytes(), &[5; 16]].concat();
    assert_eq!(
        m.send(header(type_, 7), &stream(16)).0,
        VIRTIO_GPU_RESP_ERR_INVALID_CONTEXT_ID
    );
    m.create_context();
    for bad in [17, 20, u32::MAX] {
        let (answer, _) = m.send(header(type_, 7), &stream(bad));
        assert_eq!(answer, VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER, "{bad}");
    }
    assert_eq!(m.send(header(type_, 7), &stream(12)).0, OK);
    let script = m.fake.0.lock();
    let call = script.calls.last().unwrap();
    let range = RamRange {
        offset: REQUEST + 32,
        len: 12,
    };
    assert_eq!((call.head.context, &*call.ranges), (7, [range].as_slice()));
    assert_eq!(
        script.calls.iter().filter(|c| c.head.what == type_).count(),
        1
    );
}

#[test]
fn contexts_are_of_kinds_that_there_are() {
    let mut m = machine();
    let of = |kind: u32| CtxCreate {
        context_init: kind.into(),
        ..Default::default()
    };
    let create = VIRTIO_GPU_CMD_CTX_CREATE;
    for bad in [2, 6, 0x104] {
        assert_eq!(
            m.command(create, &of(bad)),
            VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER
        );
    }
    let none = m.send(header(create, 0), of(4).as_bytes()).0;
    assert_eq!(none, VIRTIO_GPU_RESP_ERR_INVALID_CONTEXT_ID);
    assert_eq!(m.command(create, &of(0)), OK);
    assert_eq!(
        m.command(create, &of(4)),
        VIRTIO_GPU_RESP_ERR_INVALID_CONTEXT_ID
    );
    assert_eq!(m.command(VIRTIO_GPU_CMD_CTX_DESTROY, &[0_u8; 0]), OK);
    assert_eq!(m.command(create, &of(4)), OK);
}

#[test]
fn what_the_renderer_refuses_does_not_exist() {
    let mut m = machine();
    assert_eq!(m.create_3d(3, 99), VIRTIO_GPU_RESP_ERR_UNSPEC);
    let unref = VIRTIO_GPU_CMD_RESOURCE_UNREF;
    assert_eq!(
        m.command(unref, &resource(3)),
        VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID
    );
    assert_eq!(m.create_3d(3, 2), OK);
    assert_eq!(m.create_3d(3, 2), VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID);
    assert_eq!(m.command(unref, &resource(3)), OK);
    m.wait_calls(unref, 1);
}

#[test]
fn what_needs_no_answer_does_not_fill_the_socket() {
    let mut m = machine();
    let unref = VIRTIO_GPU_CMD_RESOURCE_UNREF;
    let count = 2 * MAX_UNANSWERED as u32 + 2;
    for id in 1..=count {
        assert_eq!(m.create_3d(id, 2), OK);
    }
    for id in 1..=count {
        assert_eq!(m.command(unref, &resource(id)), OK);
    }
    m.wait_calls(unref, count as usize);
    let script = m.fake.0.lock();
    let answered = script
        .calls
        .iter()
        .filter(|call| call.head.what == unref && call.head.unanswered == 0);
    assert_eq!(answered.count(), 2);
}

#[test]
fn what_a_context_has_needs_no_answer() {
    let mut m = machine();
    m.create_context();
    assert_eq!(m.create_3d(1, 2), OK);
    for type_ in [
        VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE,
        VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE,
    ] {
        assert_eq!(m.command(type_, &resource(1)), OK);
        let nothing = VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID;
        assert_eq!(m.command(type_, &resource(2)), nothing);
        m.wait_calls(type_, 1);
        let script = m.fake.0.lock();
        let call = script.calls.iter().find(|call| call.head.what == type_);
        let (head, body) = call.map(|call| (&call.head, &call.body)).unwrap();
        assert_eq!((head.context, head.unanswered), (7, 1));
        assert_eq!(body, resource(1).as_bytes());
    }
}

#[test]
fn the_display_survives_the_renderer() {
    let mut m = machine();
    m.create_context();
    let create = VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB;
    assert_eq!(m.command(create, &blob(1, 1)), OK);
    assert_eq!(m.map(1, 0), VIRTIO_GPU_RESP_OK_MAP_INFO);
    let submit = header(VIRTIO_GPU_CMD_SUBMIT_3D, 7);
    let before = m.driver.used_index(0);
    {
        let mut script = m.fake.0.lock();
        script.keeps_fences = true;
        script.silent = Some(VIRTIO_GPU_CMD_CTX_DESTROY);
    }
    // One waits for its fence, one for its answer, and one behind it.
    let info = header(VIRTIO_GPU_CMD_GET_DISPLAY_INFO, 0);
    m.submit_fenced(&[submit, header(VIRTIO_GPU_CMD_CTX_DESTROY, 7), info]);
    m.wait_calls(VIRTIO_GPU_CMD_CTX_DESTROY, 1);
    assert_eq!(m.driver.used_index(0), before);
    m.fake.kill();
    m.driver.wait(|d| d.used_index(0) == before.wrapping_add(3));
    assert!(!m.driver.status.needs_reset());
    // What was there can be given up.
    assert_eq!(m.create_3d(5, 2), VIRTIO_GPU_RESP_ERR_UNSPEC);
    assert_eq!(m.seen(0), Some(1));
    let unmap = VIRTIO_GPU_CMD_RESOURCE_UNMAP_BLOB;
    assert_eq!(m.command(unmap, &resource(1)), OK);
    assert_eq!(m.command(VIRTIO_GPU_CMD_RESOURCE_UNREF, &resource(1)), OK);
    // The next driver has another renderer.
    m.gpu.reset();
    m.fake.0.lock().silent = None;
    m.activate();
    m.create_context();
    assert_eq!(m.create_3d(5, 2), OK);
}

#[test]
fn a_renderer_that_hangs_holds_up_no_reset() {
    let mut m = machine();
    m.fake.0.lock().silent = Some(VIRTIO_GPU_CMD_CTX_CREATE);
    m.submit_fenced(&[header(VIRTIO_GPU_CMD_CTX_CREATE, 7)]);
    m.wait_calls(VIRTIO_GPU_CMD_CTX_CREATE, 1);
    m.gpu.reset();
}

#[test]
fn a_driver_without_3d_has_no_renderer() {
    let mut m = machine();
    m.gpu.reset();
    let activation = m.driver.activation_with(VIRTIO_GPU_F_EDID);
    m.gpu.activate(activation).unwrap();
    assert_eq!(m.create_3d(3, 2), VIRTIO_GPU_RESP_ERR_UNSPEC);
}
