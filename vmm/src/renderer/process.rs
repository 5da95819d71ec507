//! What runs in the renderer's process: takes calls, has virglrenderer do them, answers.
//!
//! It ends with the socket that it was given: whatever a command stream made of it, it has nothing but that,
//! guest RAM, what the host's drivers opened and what [`sandbox`] leaves.

use std::{
    collections::BTreeMap,
    ffi::c_void,
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use fanlight_devices::{
    error_line,
    virtio::gpu::{
        protocol::*,
        render::{
            ReadBack,
            wire::{
                CapsetInfo, FAILED, FAILED_NO_FILES, FencePosition, REPLY_DONE, REPLY_FAILED,
                REPLY_FENCE, REPLY_READY, REQUEST_EXPORT, REQUEST_EXPORT_TEXTURE, REQUEST_FENCE,
                REQUEST_READ_BACK, REQUEST_START, RamRange, Reply, Request, Start,
            },
        },
    },
};
use libc::iovec;
use rustix::{
    event::{PollFd, PollFlags, poll},
    mm::{MapFlags, ProtFlags, mmap, munmap},
    net::RecvFlags,
    process::{Resource, Rlimit},
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{
    library::{Fences, Library, Refused},
    sandbox, standard_input,
};

/// Where virglrenderer finds its render server, and what says that it is elsewhere.
const SERVER: &str = "/usr/libexec/virgl_render_server";
const SERVER_ENV: &str = "RENDER_SERVER_EXEC_PATH";

/// The socket, for the library's threads.
static SOCKET: OnceLock<OwnedFd> = OnceLock::new();
static TO_SOCKET: &dyn Fences = &ToSocket;

struct ToSocket;

impl ToSocket {
    fn tell(&self, fence: FencePosition) {
        let mut say = Reply::of(REPLY_FENCE);
        say.head.fence = fence;
        if let Some(socket) = SOCKET.get() {
            // Who does not listen any more is about to end this process.
            let _ = say.send(socket);
        }
    }
}

impl Fences for ToSocket {
    fn passed(&self, number: u32) {
        self.tell(FencePosition {
            number,
            ..Default::default()
        });
    }

    fn ring_passed(&self, context: u32, ring: u32, number: u32) {
        self.tell(FencePosition {
            of_ring: 1,
            context,
            ring,
            number,
        });
    }
}

/// Runs until the socket on standard input is closed.
pub fn run() {
    let result = standard_input().and_then(|socket| {
        let socket = SOCKET.get_or_init(|| socket);
        confine();
        end_with(socket);
        serve(socket)
    });
    if let Err(error) = result {
        tracing::warn!(%error, "the renderer's socket failed");
    }
    exit();
}

/// Ends the process with no more of the library's code.
fn exit() -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(0) }
}

/// Takes from the process what it does not need, and gives it the descriptors that it does.
fn confine() {
    if let Err(error) = sandbox::enter() {
        let error = error_line(&error);
        tracing::warn!("the renderer is less confined than it should be: {error}");
    }
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let _ = rustix::process::setrlimit(Resource::Core, none);
    crate::host::files::allow_all();
}

/// Ends the process when the socket's other end goes, whatever the library does then.
fn end_with(socket: &'static OwnedFd) {
    let watch = move || {
        loop {
            let mut fds = [PollFd::new(socket, PollFlags::empty())];
            match poll(&mut fds, None) {
                Ok(1..) | Err(_) if !fds[0].revents().is_empty() => exit(),
                _ => {}
            }
        }
    };
    // Without the thread the process ends when it next looks at the socket.
    let _ = std::thread::Builder::new()
        .name("watch".into())
        .spawn(watch);
}

fn serve(socket: &OwnedFd) -> io::Result<()> {
    let Some(first) = Request::receive(socket, RecvFlags::empty())? else {
        return Ok(());
    };
    let mut renderer = match start(first) {
        Ok((renderer, infos)) => {
            let mut say = Reply::of(REPLY_READY);
            say.data = infos.as_bytes().into();
            say.send(socket)?;
            renderer
        }
        Err(error) => {
            let mut say = Reply::of(REPLY_FAILED);
            say.data = error.into_bytes();
            return say.send(socket);
        }
    };
    while let Some(call) = Request::receive(socket, RecvFlags::empty())? {
        let unanswered = call.head.unanswered != 0;
        let say = renderer.serve(call);
        if !unanswered {
            say.send(socket)?;
        }
    }
    Ok(())
}

fn start(first: Request) -> Result<(Renderer, Vec<CapsetInfo>), String> {
    let bad = || "the renderer was not started by Fanlight".to_owned();
    let (REQUEST_START, Some(ram)) = (first.head.what, first.file) else {
        return Err(bad());
    };
    let start = Start::read_from_bytes(&first.body).map_err(|_| bad())?;
    let (virgl, venus) = (start.virgl != 0, start.venus != 0);
    if venus {
        find_server()?;
    }
    let ram = Mapping::new(&ram).map_err(|error| format!("cannot map guest memory: {error}"))?;
    let library = Library::start(virgl, venus, &TO_SOCKET).map_err(|error| error_line(&error))?;
    let wanted = [
        (VIRTIO_GPU_CAPSET_VIRGL, virgl),
        (VIRTIO_GPU_CAPSET_VIRGL2, virgl),
        // The library tells of it whether or not it is on.
        (VIRTIO_GPU_CAPSET_VENUS, venus),
    ];
    let mut infos = Vec::new();
    for (id, wanted) in wanted {
        let (max_version, max_size) = library.capset_info(id);
        if wanted && max_size == 0 {
            return Err(format!(
                "virglrenderer has no capability set {id}: install a build with it, or ask for another renderer"
            ));
        }
        if wanted {
            infos.push(CapsetInfo {
                id,
                max_version,
                max_size,
            });
        }
    }
    let renderer = Renderer {
        library,
        ram,
        memory: BTreeMap::new(),
    };
    Ok((renderer, infos))
}

/// Vulkan without the server would run in this process, which the library does not survive.
fn find_server() -> Result<(), String> {
    let path = std::env::var_os(SERVER_ENV).map_or_else(|| PathBuf::from(SERVER), PathBuf::from);
    if Path::new(&path).exists() {
        return Ok(());
    }
    Err(format!(
        "Venus needs virglrenderer's render server, and there is no {}: install it, in Debian virgl-server, \
         or name it in {SERVER_ENV}",
        path.display()
    ))
}

/// Whether the process has as many descriptors as it may.
fn no_files() -> bool {
    let none = [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE];
    let copy = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3);
    copy.is_err_and(|error| none.contains(&error))
}

/// A file's memory, shared.
struct Mapping {
    start: *mut c_void,
    len: usize,
}

impl Mapping {
    fn new(file: &File) -> io::Result<Self> {
        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address of the kernel's choice. Nothing refers to it but by pointers.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file.as_fd(),
                0,
            )
        }?;
        Ok(Self { start, len })
    }

    /// A part of it.
    fn part(&self, range: &RamRange) -> Result<iovec, Refused> {
        let len = self.len as u64;
        let end = range.offset.checked_add(range.len);
        if end.is_none_or(|end| end > len) {
            return Err(Refused);
        }
        Ok(iovec {
            iov_base: self.start.wrapping_byte_add(range.offset as usize),
            iov_len: range.len as usize,
        })
    }

    /// Copies a part to the front of `to`; how many bytes that were.
    fn copy(&self, range: &RamRange, to: &mut [u8]) -> Result<usize, Refused> {
        let part = self.part(range)?;
        if part.iov_len > to.len() {
            return Err(Refused);
        }
        let from = part.iov_base.cast();
        // SAFETY: the part is within the mapping and `to` is long enough. The guest may write meanwhile: any
        // bytes will do.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), part.iov_len) };
        Ok(part.iov_len)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's, and pointers into it are gone.
        let _ = unsafe { munmap(self.start, self.len) };
    }
}

struct Renderer {
    library: Library,
    ram: Mapping,
    /// Guest memory of resources, as the library points to it.
    memory: BTreeMap<u32, Box<[iovec]>>,
}

fn body<T: FromBytes + KnownLayout + Immutable>(call: &Request) -> Result<T, Refused> {
    T::read_from_bytes(&call.body).map_err(|_| Refused)
}

impl Renderer {
    fn serve(&mut self, call: Request) -> Reply {
        let mut say = Reply::of(REPLY_DONE);
        let fence = call.head.fence;
        match self.act(call, &mut say) {
            Ok(()) if fence.number != 0 => {
                let made = if fence.of_ring != 0 {
                    let FencePosition { context, ring, .. } = fence;
                    self.library.ring_fence(context, ring, fence.number)
                } else {
                    self.library.fence(fence.number)
                };
                if made.is_ok() {
                    say.head.fence = fence;
                }
            }
            Ok(()) => {}
            Err(Refused) if no_files() => say.head.failed = FAILED_NO_FILES,
            Err(Refused) => say.head.failed = FAILED,
        }
        say
    }

    fn act(&mut self, call: Request, say: &mut Reply) -> Result<(), Refused> {
        let context = call.head.context;
        let library = &self.library;
        match call.head.what {
            REQUEST_FENCE => {}
            REQUEST_EXPORT => {
                let command: ResourceId = body(&call)?;
                let (file, info) = library.export(command.resource_id.get())?;
                say.file = Some(file);
                say.head.value = info;
            }
            REQUEST_EXPORT_TEXTURE => {
                let command: ResourceId = body(&call)?;
                if let Ok((file, layout)) = library.export_texture(command.resource_id.get()) {
                    say.file = Some(file);
                    say.data = layout.as_bytes().into();
                }
            }
            REQUEST_READ_BACK => return self.read_back(&call),
            VIRTIO_GPU_CMD_GET_CAPSET => {
                let command: GetCapset = body(&call)?;
                let (id, version) = (command.capset_id.get(), command.capset_version.get());
                say.data = library.capset(id, version);
            }
            VIRTIO_GPU_CMD_CTX_CREATE => return library.create_context(context, &body(&call)?),
            VIRTIO_GPU_CMD_CTX_DESTROY => library.destroy_context(context),
            VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE => {
                let command: ResourceId = body(&call)?;
                library.attach_to_context(context, command.resource_id.get());
            }
            VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE => {
                let command: ResourceId = body(&call)?;
                library.detach_from_context(context, command.resource_id.get());
            }
            VIRTIO_GPU_CMD_SUBMIT_3D => return self.submit(&call),
            VIRTIO_GPU_CMD_RESOURCE_CREATE_3D => return library.create_3d(&body(&call)?),
            VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB => {
                let command: ResourceCreateBlob = body(&call)?;
                library.create_blob(context, &command)?;
                // One that cannot be shown may be of use otherwise.
                let shown = command.blob_flags.get() & VIRTIO_GPU_BLOB_FLAG_USE_MAPPABLE != 0;
                if shown && let Ok((file, cache)) = library.export(command.resource_id.get()) {
                    say.file = Some(file);
                    say.head.value = cache;
                }
            }
            VIRTIO_GPU_CMD_TRANSFER_TO_HOST_3D => {
                return library.transfer(context, &body(&call)?, true);
            }
            VIRTIO_GPU_CMD_TRANSFER_FROM_HOST_3D => {
                return library.transfer(context, &body(&call)?, false);
            }
            VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING => {
                let command: ResourceAttachBacking = body(&call)?;
                return self.attach(command.resource_id.get(), &call.ranges);
            }
            VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING => {
                let command: ResourceId = body(&call)?;
                self.detach(command.resource_id.get());
            }
            VIRTIO_GPU_CMD_RESOURCE_UNREF => {
                let command: ResourceId = body(&call)?;
                self.detach(command.resource_id.get());
                self.library.unref(command.resource_id.get());
            }
            _ => return Err(Refused),
        }
        Ok(())
    }

    /// The library reads a stream more than once: it gets a copy that the guest cannot change.
    fn submit(&self, call: &Request) -> Result<(), Refused> {
        let command: CmdSubmit = body(call)?;
        let size = command.size.get();
        let mut stream = vec![0_u64; (size as usize).div_ceil(8)];
        let mut rest = stream.as_mut_bytes();
        for range in &call.ranges {
            let copied = self.ram.copy(range, rest)?;
            rest = rest.get_mut(copied..).ok_or(Refused)?;
        }
        self.library
            .submit(call.head.context, &mut stream, size / 4)
    }

    fn attach(&mut self, resource: u32, ranges: &[RamRange]) -> Result<(), Refused> {
        if self.memory.contains_key(&resource) {
            return Err(Refused);
        }
        let parts = ranges.iter().map(|range| self.ram.part(range));
        let mut parts = parts.collect::<Result<Box<[iovec]>, Refused>>()?;
        // SAFETY: kept until it is detached; RAM stays mapped as long as the library is there.
        unsafe { self.library.attach_memory(resource, &mut parts) }?;
        self.memory.insert(resource, parts);
        Ok(())
    }

    fn detach(&mut self, resource: u32) {
        if let Some(memory) = self.memory.remove(&resource) {
            self.library.detach_memory(resource);
            drop(memory);
        }
    }

    fn read_back(&self, call: &Request) -> Result<(), Refused> {
        let command: ReadBack = body(call)?;
        let file = call.file.as_ref().ok_or(Refused)?;
        let pixels = Mapping::new(file).map_err(|_| Refused)?;
        let whole = RamRange {
            offset: 0,
            len: command.size,
        };
        let memory = pixels.part(&whole)?;
        let area = [command.x, command.y, command.width, command.height];
        // SAFETY: the mapping is this function's.
        unsafe {
            self.library.read_pixels(
                command.resource,
                area,
                command.stride,
                command.offset,
                memory,
            )
        }
    }
}
