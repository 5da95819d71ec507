//! The renderer's process: receives requests on its socket, executes them and replies.
//!
//! It ends when the socket closes. Whatever a command stream makes the library do, the process has only the socket,
//! guest RAM, what the host's drivers opened, and what [`sandbox`] leaves.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use fanlight_devices::{
    error_line,
    virtio::gpu::{
        protocol::{VIRTIO_GPU_CAPSET_VENUS, VIRTIO_GPU_CAPSET_VIRGL, VIRTIO_GPU_CAPSET_VIRGL2},
        render::wire::{
            CapsetInfo, FencePosition, REPLY_FAILED, REPLY_FENCE, REPLY_READY, REQUEST_START,
            Reply, Request, Start,
        },
    },
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    net::RecvFlags,
    process::{Resource, Rlimit},
};
use zerocopy::{FromBytes, IntoBytes};

use super::{
    commands::Renderer,
    library::{Fences, Library},
    mapping::Mapping,
    sandbox,
};

/// The default path of the render server, and the variable that virglrenderer reads another one from.
const SERVER: &str = "/usr/libexec/virgl_render_server";
const SERVER_ENV: &str = "RENDER_SERVER_EXEC_PATH";

/// The socket, for threads of the library.
static SOCKET: OnceLock<OwnedFd> = OnceLock::new();
static TO_SOCKET: &dyn Fences = &ToSocket;

/// Sends passed fences to the device.
struct ToSocket;

impl ToSocket {
    fn send(&self, fence: FencePosition) {
        let mut reply = Reply::of(REPLY_FENCE);
        reply.head.fence = fence;
        if let Some(socket) = SOCKET.get() {
            // If the other end is gone, this process ends soon.
            let _ = reply.send(socket);
        }
    }
}

impl Fences for ToSocket {
    fn passed(&self, number: u32) {
        self.send(FencePosition {
            number,
            ..Default::default()
        });
    }

    fn ring_passed(&self, context: u32, ring: u32, number: u32) {
        self.send(FencePosition {
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

/// Ends the process without exit handlers of the library.
fn exit() -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(0) }
}

/// Enters the sandbox, forbids core dumps and allows all descriptors.
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

/// Ends the process when the other end of the socket closes, whatever the library does at that moment.
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
    // Without the thread the process ends when it next reads the socket.
    let _ = std::thread::Builder::new()
        .name("watch".into())
        .spawn(watch);
}

/// Answers requests until the socket is closed.
fn serve(socket: &OwnedFd) -> io::Result<()> {
    let Some(first) = Request::receive(socket, RecvFlags::empty())? else {
        return Ok(());
    };
    let mut renderer = match start(first) {
        Ok((renderer, infos)) => {
            let mut reply = Reply::of(REPLY_READY);
            reply.data = infos.as_bytes().into();
            reply.send(socket)?;
            renderer
        }
        Err(error) => {
            let mut reply = Reply::of(REPLY_FAILED);
            reply.data = error.into_bytes();
            return reply.send(socket);
        }
    };
    while let Some(request) = Request::receive(socket, RecvFlags::empty())? {
        let unanswered = request.head.unanswered != 0;
        let reply = renderer.serve(request);
        if !unanswered {
            reply.send(socket)?;
        }
    }
    Ok(())
}

/// Starts the library as the first request asks.
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
        // The library reports it even when Venus is off.
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
    Ok((Renderer::new(library, ram), infos))
}

/// Checks for the render server: without it the library runs Vulkan in this process, and crashes.
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

/// The socket that the renderer was started with.
fn standard_input() -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?)
}
