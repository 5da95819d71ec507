//! A test compositor with one window, a touch screen, and a pointer that rests in the window. No packaged compositor
//! accepts touch input from a program, or tells which cursor a window sets.

use std::{
    collections::VecDeque,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use fanlight_tests::{Context, Failure, Result, host_side::compositor::Viewer};
use wayland_protocols::xdg::shell::server::{
    xdg_positioner::XdgPositioner,
    xdg_surface::{self, XdgSurface},
    xdg_toplevel::XdgToplevel,
    xdg_wm_base::{self, XdgWmBase},
};
use wayland_server::{
    Client, DataInit, Dispatch, Display, DisplayHandle, GlobalDispatch, ListeningSocket, New,
    backend::ClientData,
    protocol::{
        wl_buffer::WlBuffer,
        wl_callback::WlCallback,
        wl_compositor::{self, WlCompositor},
        wl_keyboard::WlKeyboard,
        wl_pointer::{self, WlPointer},
        wl_region::WlRegion,
        wl_seat::{self, WlSeat},
        wl_shm::{self, WlShm},
        wl_shm_pool::{self, WlShmPool},
        wl_surface::{self, WlSurface},
        wl_touch::WlTouch,
    },
};

/// A touch event. Positions are in window pixels.
#[derive(Clone, Copy, Debug)]
pub enum Finger {
    Down(i32, f64, f64),
    Moves(i32, f64, f64),
    Up(i32),
    /// The compositor claims the whole gesture.
    Cancelled,
}

/// Where a cursor's image points, from its left and from its top.
pub type HotSpot = (i32, i32);

/// The compositor, on its own thread. Its window has the size given at the start.
pub struct TestCompositor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
    runtime: tempfile::TempDir,
}

/// The name of its socket.
const SOCKET: &str = "wayland";

#[derive(Default)]
struct Shared {
    fingers: Mutex<VecDeque<Finger>>,
    /// Whether a window can be touched and pointed at.
    ready: AtomicBool,
    cursor: Mutex<Option<HotSpot>>,
    end: AtomicBool,
}

impl TestCompositor {
    /// Starts the compositor.
    pub fn start(width: u32, height: u32) -> Result<Self> {
        let runtime = tempfile::tempdir().context("cannot make a directory")?;
        let socket = runtime.path().join(SOCKET);
        let listener = ListeningSocket::bind_absolute(socket).context("cannot listen")?;
        let size = (width as i32, height as i32);
        let shared = Arc::new(Shared::default());
        let thread = thread::spawn({
            let shared = shared.clone();
            move || serve(&listener, &shared, size)
        });
        Ok(Self {
            shared,
            thread: Some(thread),
            runtime,
        })
    }

    /// `fanlight view` in this compositor.
    pub fn viewer(&self, fanlight: &Path, api: &Path) -> Result<Viewer> {
        Viewer::start(fanlight, api, self.runtime.path(), SOCKET)
    }

    /// Whether a viewer shows a window, and accepts input from the touch screen and from the pointer.
    pub fn is_ready(&self) -> bool {
        self.shared.ready.load(Ordering::Acquire)
    }

    /// Sends touch events in one frame.
    pub fn touch(&self, fingers: &[Finger]) {
        lock(&self.shared.fingers).extend(fingers);
    }

    /// The hot spot of the cursor that the window set; `None` if it set none, or hid the cursor.
    pub fn cursor(&self) -> Option<HotSpot> {
        *lock(&self.shared.cursor)
    }

    /// Ends the compositor.
    pub fn stop(mut self) -> Result<()> {
        self.shared.end.store(true, Ordering::Release);
        let ended = self.thread.take().map(JoinHandle::join);
        ended
            .unwrap_or(Ok(Ok(())))
            .map_err(|_| Failure("the test compositor panicked".into()))?
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct State {
    size: (i32, i32),
    surface: Option<WlSurface>,
    xdg: Option<XdgSurface>,
    toplevel: Option<XdgToplevel>,
    configured: bool,
    touch: Option<WlTouch>,
    pointer: Option<WlPointer>,
    /// Whether the pointer is in the window.
    entered: bool,
    cursor: Option<HotSpot>,
    /// Requested frame callbacks. Answering one drops its object, which must not happen within the request.
    frames: Vec<WlCallback>,
}

struct Nobody;

impl ClientData for Nobody {}

fn serve(listener: &ListeningSocket, shared: &Shared, size: (i32, i32)) -> Result<()> {
    let mut display = Display::<State>::new().context("no Wayland display")?;
    let handle = display.handle();
    handle.create_global::<State, WlCompositor, ()>(4, ());
    handle.create_global::<State, WlShm, ()>(1, ());
    handle.create_global::<State, XdgWmBase, ()>(1, ());
    handle.create_global::<State, WlSeat, ()>(5, ());
    let mut state = State {
        size,
        surface: None,
        xdg: None,
        toplevel: None,
        configured: false,
        touch: None,
        pointer: None,
        entered: false,
        cursor: None,
        frames: Vec::new(),
    };
    while !shared.end.load(Ordering::Acquire) {
        if let Some(stream) = listener.accept().context("cannot accept")? {
            let mut clients = display.handle();
            let client = clients.insert_client(stream, Arc::new(Nobody));
            client.context("cannot take a client")?;
        }
        display
            .dispatch_clients(&mut state)
            .context("a client broke the rules")?;
        for frame in state.frames.drain(..) {
            frame.done(1);
        }
        send_input(&mut state, shared);
        *lock(&shared.cursor) = state.cursor;
        display.flush_clients().context("cannot answer a client")?;
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Has the pointer enter the window once there is one, and sends it the touch events that the test wants.
fn send_input(state: &mut State, shared: &Shared) {
    let (Some(touch), Some(pointer), Some(surface), true) = (
        &state.touch,
        &state.pointer,
        &state.surface,
        state.configured,
    ) else {
        return;
    };
    if !std::mem::replace(&mut state.entered, true) {
        pointer.enter(1, surface, 0.0, 0.0);
        pointer.frame();
    }
    shared.ready.store(true, Ordering::Release);
    let mut queue = lock(&shared.fingers);
    let any = !queue.is_empty();
    for finger in queue.drain(..) {
        match finger {
            Finger::Down(id, x, y) => touch.down(1, 1, surface, id, x, y),
            Finger::Moves(id, x, y) => touch.motion(1, id, x, y),
            Finger::Up(id) => touch.up(1, 1, id),
            Finger::Cancelled => touch.cancel(),
        }
    }
    if any {
        touch.frame();
    }
}

/// Globals that send no event when bound, and objects whose requests have no effect here.
macro_rules! silent {
    (globals: $($global:ty),*; objects: $($object:ty),*) => {
        $(impl GlobalDispatch<$global, ()> for State {
            fn bind(
                _: &mut Self, _: &DisplayHandle, _: &Client, new: New<$global>, (): &(),
                init: &mut DataInit<'_, Self>,
            ) {
                init.init(new, ());
            }
        })*
        $(impl Dispatch<$object, ()> for State {
            fn request(
                _: &mut Self, _: &Client, _: &$object,
                _: <$object as wayland_server::Resource>::Request, (): &(), _: &DisplayHandle,
                _: &mut DataInit<'_, Self>,
            ) {}
        })*
    };
}

silent!(globals: WlCompositor, XdgWmBase;
    objects: WlBuffer, WlCallback, WlKeyboard, WlRegion, WlTouch, XdgPositioner, XdgToplevel);

/// Objects that create others, or have an effect.
macro_rules! requests {
    ($($object:ty, |$state:ident, $it:pat_param, $request:ident, $init:ident| $body:block)*) => {
        $(impl Dispatch<$object, ()> for State {
            fn request(
                $state: &mut Self, _: &Client, $it: &$object,
                $request: <$object as wayland_server::Resource>::Request, (): &(), _: &DisplayHandle,
                $init: &mut DataInit<'_, Self>,
            ) $body
        })*
    };
}

requests! {
    WlCompositor, |state, _, request, init| {
        match request {
            // The first surface is the window's, the second is the cursor's.
            wl_compositor::Request::CreateSurface { id } => {
                let surface = init.init(id, ());
                state.surface.get_or_insert(surface);
            }
            wl_compositor::Request::CreateRegion { id } => {
                init.init(id, ());
            }
            _ => {}
        }
    }
    WlSurface, |state, surface, request, init| {
        match request {
            wl_surface::Request::Frame { callback } => {
                state.frames.push(init.init(callback, ()));
            }
            wl_surface::Request::Commit if state.surface.as_ref() == Some(surface) => {
                if let (Some(xdg), Some(toplevel), false) =
                    (&state.xdg, &state.toplevel, state.configured)
                {
                    toplevel.configure(state.size.0, state.size.1, vec![]);
                    xdg.configure(1);
                    state.configured = true;
                }
            }
            _ => {}
        }
    }
    XdgWmBase, |state, _, request, init| {
        match request {
            xdg_wm_base::Request::GetXdgSurface { id, .. } => {
                state.xdg = Some(init.init(id, ()));
            }
            xdg_wm_base::Request::CreatePositioner { id } => {
                init.init(id, ());
            }
            _ => {}
        }
    }
    XdgSurface, |state, _, request, init| {
        if let xdg_surface::Request::GetToplevel { id } = request {
            state.toplevel = Some(init.init(id, ()));
        }
    }
    WlShm, |_state, _, request, init| {
        if let wl_shm::Request::CreatePool { id, .. } = request {
            init.init(id, ());
        }
    }
    WlShmPool, |_state, _, request, init| {
        if let wl_shm_pool::Request::CreateBuffer { id, .. } = request {
            init.init(id, ());
        }
    }
    WlPointer, |state, _, request, _init| {
        if let wl_pointer::Request::SetCursor { surface, hotspot_x, hotspot_y, .. } = request {
            state.cursor = surface.map(|_| (hotspot_x, hotspot_y));
        }
    }
    WlSeat, |state, _, request, init| {
        match request {
            wl_seat::Request::GetTouch { id } => state.touch = Some(init.init(id, ())),
            wl_seat::Request::GetPointer { id } => state.pointer = Some(init.init(id, ())),
            wl_seat::Request::GetKeyboard { id } => {
                init.init(id, ());
            }
            _ => {}
        }
    }
}

impl GlobalDispatch<WlShm, ()> for State {
    fn bind(
        _: &mut Self,
        _: &DisplayHandle,
        _: &Client,
        new: New<WlShm>,
        (): &(),
        init: &mut DataInit<'_, Self>,
    ) {
        let shm = init.init(new, ());
        shm.format(wl_shm::Format::Xrgb8888);
        shm.format(wl_shm::Format::Argb8888);
    }
}

impl GlobalDispatch<WlSeat, ()> for State {
    fn bind(
        _: &mut Self,
        _: &DisplayHandle,
        _: &Client,
        new: New<WlSeat>,
        (): &(),
        init: &mut DataInit<'_, Self>,
    ) {
        let has = wl_seat::Capability::Touch | wl_seat::Capability::Pointer;
        init.init(new, ()).capabilities(has);
    }
}
