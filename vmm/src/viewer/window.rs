//! A Wayland window on one output: shows pictures, and tells what the user does with it.

use std::{
    collections::HashSet,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use thiserror::Error;
use wayland_client::{
    Connection, DispatchError, EventQueue, QueueHandle,
    backend::WaylandError,
    globals::{BindError, GlobalError, registry_queue_init},
    protocol::{
        wl_buffer::WlBuffer, wl_compositor::WlCompositor, wl_pointer::WlPointer, wl_seat::WlSeat,
        wl_shm::WlShm, wl_surface::WlSurface,
    },
};
use wayland_protocols::{
    wp::{
        keyboard_shortcuts_inhibit::zv1::client::{
            zwp_keyboard_shortcuts_inhibit_manager_v1::ZwpKeyboardShortcutsInhibitManagerV1,
            zwp_keyboard_shortcuts_inhibitor_v1::ZwpKeyboardShortcutsInhibitorV1,
        },
        linux_dmabuf::zv1::client::zwp_linux_dmabuf_v1::ZwpLinuxDmabufV1,
        viewporter::client::{wp_viewport::WpViewport, wp_viewporter::WpViewporter},
    },
    xdg::shell::client::{
        xdg_surface::XdgSurface, xdg_toplevel::XdgToplevel, xdg_wm_base::XdgWmBase,
    },
};

use super::{
    buffers::{Buffer, Buffers},
    cursor::CursorSurface,
    picture::{CursorPicture, Picture},
    seat::{Grab, Scroll, SeatDevices, Touches},
};

/// Why there is no window.
#[derive(Debug, Error)]
pub enum WindowError {
    /// No compositor.
    #[error(
        "no Wayland compositor: run this in a Wayland session, or set WAYLAND_DISPLAY to its socket"
    )]
    Connect(#[from] wayland_client::ConnectError),
    /// The compositor's list of what it offers could not be had.
    #[error("the Wayland compositor does not answer")]
    Globals(#[from] GlobalError),
    /// The compositor lacks something.
    #[error("the Wayland compositor lacks what a window needs")]
    Bind(#[from] BindError),
    /// The compositor ended the connection, or said something wrong.
    #[error("the connection to the Wayland compositor broke")]
    Dispatch(#[from] DispatchError),
    /// The same, while sending.
    #[error("the connection to the Wayland compositor broke")]
    Send(#[from] WaylandError),
    /// Memory for pictures.
    #[error("cannot make memory for pictures")]
    Memory(#[from] io::Error),
}

/// What the user, or the compositor, did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum WindowEvent {
    /// The window has another size, in pixels.
    Resized {
        /// Width.
        width: u32,
        /// Height.
        height: u32,
    },
    /// A key, by its evdev code.
    Key {
        /// `KEY_*` of Linux `input-event-codes.h`.
        code: u32,
        /// Down or up.
        pressed: bool,
    },
    /// The pointer, as a part of the window's size: 0 to 1.
    Pointer {
        /// From the left.
        x: f64,
        /// From the top.
        y: f64,
    },
    /// A button, by its evdev code.
    Button {
        /// `BTN_*`.
        code: u32,
        /// Down or up.
        pressed: bool,
    },
    /// The wheel, in notches times 120.
    Wheel {
        /// To the right.
        horizontal: i32,
        /// Down.
        vertical: i32,
    },
    /// A finger, as a part of the window's size.
    Touch {
        /// Which finger.
        id: i32,
        /// Where it is; `None` when it has left.
        at: Option<(f64, f64)>,
    },
    /// What was drawn up to this serial is on the screen, or never will be.
    Shown {
        /// The last that was given to [`Window::damage`].
        serial: u64,
    },
    /// Neither the compositor nor this process can read the picture: it is to come as a copy.
    Unreadable,
    /// The keyboard's focus went: keys that were down are up.
    Unfocused,
    /// The window is to close.
    Closed,
}

/// A window.
pub struct Window {
    connection: Connection,
    queue: EventQueue<State>,
    state: State,
}

/// What the compositor's events change.
pub(super) struct State {
    pub handle: QueueHandle<State>,
    pub events: Vec<WindowEvent>,
    surface: WlSurface,
    toplevel: XdgToplevel,
    viewport: Option<WpViewport>,
    pub buffers: Buffers,
    pub seat: Option<WlSeat>,
    pub devices: SeatDevices,
    pub scroll: Scroll,
    pub grab: Grab,
    pub touches: Touches,
    pub cursor: CursorSurface,
    /// The window's size in pixels.
    pub size: (u32, u32),
    /// What the compositor proposed and has not been told of yet.
    pub proposed: Option<(u32, u32)>,
    configured: bool,
    shown: Option<Buffer>,
    /// The guest shows nothing.
    blank: bool,
    /// Damage that waits for the compositor to want another frame.
    pending: Vec<[i32; 4]>,
    serial: u64,
    /// The compositor has a frame that it has not shown.
    waiting: bool,
    /// Buffers that the compositor could not import.
    pub failed: HashSet<u64>,
}

impl Window {
    /// Opens a window of the given size.
    pub fn open(title: &str, width: u32, height: u32) -> Result<Self, WindowError> {
        let connection = Connection::connect_to_env()?;
        let (globals, mut queue) = registry_queue_init::<State>(&connection)?;
        let handle = queue.handle();
        let compositor: WlCompositor = globals.bind(&handle, 4..=6, ())?;
        let shell: XdgWmBase = globals.bind(&handle, 1..=6, ())?;
        let shm: WlShm = globals.bind(&handle, 1..=1, ())?;
        let dmabuf: Option<ZwpLinuxDmabufV1> = globals.bind(&handle, 3..=3, ()).ok();
        let viewporter: Option<WpViewporter> = globals.bind(&handle, 1..=1, ()).ok();
        let inhibit: Option<ZwpKeyboardShortcutsInhibitManagerV1> =
            globals.bind(&handle, 1..=1, ()).ok();
        let seat: Option<WlSeat> = globals.bind(&handle, 5..=8, ()).ok();

        let surface = compositor.create_surface(&handle, ());
        let xdg_surface: XdgSurface = shell.get_xdg_surface(&surface, &handle, ());
        let toplevel = xdg_surface.get_toplevel(&handle, ());
        toplevel.set_title(title.into());
        toplevel.set_app_id("fanlight".into());
        let viewport = viewporter.map(|v| v.get_viewport(&surface, &handle, ()));
        surface.commit();
        let mut state = State {
            events: Vec::new(),
            cursor: CursorSurface::new(compositor.create_surface(&handle, ()), shm.clone()),
            buffers: Buffers::new(shm, dmabuf),
            grab: Grab::new(inhibit),
            touches: Touches::default(),
            devices: SeatDevices::default(),
            scroll: Scroll::default(),
            handle,
            surface,
            toplevel,
            viewport,
            seat,
            size: (width, height),
            proposed: None,
            configured: false,
            shown: None,
            blank: true,
            pending: Vec::new(),
            serial: 0,
            waiting: false,
            failed: HashSet::new(),
        };
        while !state.configured {
            queue.blocking_dispatch(&mut state)?;
        }
        state.show(None)?;
        Ok(Self {
            connection,
            queue,
            state,
        })
    }

    /// Readable when [`Self::dispatch`] has something to do.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    /// Takes what the compositor says, without waiting.
    pub fn dispatch(&mut self) -> Result<Vec<WindowEvent>, WindowError> {
        if let Some(guard) = self.queue.prepare_read() {
            match guard.read() {
                Err(WaylandError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => {
                    read?;
                }
            }
        }
        self.queue.dispatch_pending(&mut self.state)?;
        self.state.retry_failed()?;
        self.flush()?;
        Ok(std::mem::take(&mut self.state.events))
    }

    fn flush(&self) -> Result<(), WindowError> {
        match self.queue.flush() {
            // A compositor that does not read gets the rest later.
            Err(WaylandError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => Ok(result?),
        }
    }

    /// Shows another picture, or black.
    pub fn show(&mut self, picture: Option<Picture>) -> Result<(), WindowError> {
        self.state.show(picture)?;
        self.flush()
    }

    /// The picture has changed: `areas` are x, y, width and height in its pixels.
    pub fn damage(&mut self, areas: &[[i32; 4]], serial: u64) -> Result<(), WindowError> {
        self.state.pending.extend_from_slice(areas);
        self.state.serial = serial;
        self.state.present()?;
        self.flush()
    }

    /// The guest's cursor looks like this, or is hidden.
    pub fn set_cursor(&mut self, picture: Option<CursorPicture>) -> Result<(), WindowError> {
        let state = &mut self.state;
        state.cursor.set(picture, &state.handle)?;
        self.flush()
    }
}

impl State {
    /// A guest that shows nothing has a black window: one without a buffer would be gone, and could not come
    /// back before the compositor had configured it anew (xdg-shell, xdg_surface).
    fn show(&mut self, picture: Option<Picture>) -> Result<(), WindowError> {
        self.blank = picture.is_none();
        let buffer = match picture {
            Some(picture) => self.buffers.import(picture, &self.handle)?,
            None if self.viewport.is_some() => self.buffers.blank((1, 1), &self.handle)?,
            None => self.buffers.blank(self.size, &self.handle)?,
        };
        self.pending = vec![buffer.whole()];
        self.events.extend(buffer.unreadable());
        self.shown = Some(buffer);
        self.present()
    }

    /// Commits what waits, unless the compositor has a frame of ours already.
    fn present(&mut self) -> Result<(), WindowError> {
        let Some(buffer) = &self.shown else {
            return Ok(());
        };
        if !self.configured || self.waiting || self.pending.is_empty() {
            return Ok(());
        }
        let Some(wl_buffer) = buffer.ready()? else {
            return Ok(());
        };
        self.surface.attach(Some(&wl_buffer), 0, 0);
        for [x, y, width, height] in self.pending.drain(..) {
            self.surface.damage_buffer(x, y, width, height);
        }
        if let Some(viewport) = &self.viewport {
            viewport.set_destination(self.size.0.max(1) as i32, self.size.1.max(1) as i32);
        }
        self.surface.frame(&self.handle, FrameSerial(self.serial));
        self.surface.commit();
        self.waiting = true;
        Ok(())
    }

    /// The compositor wants the next frame.
    pub fn frame_done(&mut self, serial: u64) {
        self.waiting = false;
        self.events.push(WindowEvent::Shown { serial });
        if let Err(error) = self.present() {
            tracing::error!(%error, "cannot show a picture");
        }
    }

    /// The compositor has imported a dma-buf, or could not.
    pub fn imported(&mut self, id: u64, wl_buffer: Option<WlBuffer>) {
        match (&mut self.shown, wl_buffer) {
            (Some(buffer), Some(wl_buffer)) if buffer.id() == id => buffer.imported(wl_buffer),
            (_, Some(wl_buffer)) => wl_buffer.destroy(),
            (_, None) => {
                self.failed.insert(id);
            }
        }
        if let Err(error) = self.present() {
            tracing::error!(%error, "cannot show a picture");
        }
    }

    /// A copy can be made again.
    pub fn buffer_is_free(&mut self) {
        if let Err(error) = self.present() {
            tracing::error!(%error, "cannot show a picture");
        }
    }

    /// Copies what could not be imported.
    fn retry_failed(&mut self) -> Result<(), WindowError> {
        let failed = std::mem::take(&mut self.failed);
        if let Some(buffer) = &mut self.shown
            && failed.contains(&buffer.id())
        {
            self.buffers.fall_back(buffer, &self.handle)?;
            self.events.extend(buffer.unreadable());
            self.present()?;
        }
        Ok(())
    }

    /// The compositor acknowledged a size.
    pub fn configure(&mut self) {
        self.configured = true;
        if let Some((width, height)) = self.proposed.take()
            && (width, height) != self.size
        {
            self.size = (width, height);
            self.events.push(WindowEvent::Resized { width, height });
            self.pending.extend(self.shown.as_ref().map(Buffer::whole));
        }
        let presented = if self.blank && self.viewport.is_none() {
            self.show(None)
        } else {
            self.present()
        };
        if let Err(error) = presented {
            tracing::error!(%error, "cannot show a picture");
        }
    }

    /// The window's surface, as a target of events.
    pub fn is_window(&self, surface: &WlSurface) -> bool {
        *surface == self.surface
    }

    /// A place on the surface as a part of the window's size.
    pub fn place(&self, x: f64, y: f64) -> (f64, f64) {
        let part = |at: f64, size: u32| (at / f64::from(size.max(1))).clamp(0.0, 1.0);
        (part(x, self.size.0), part(y, self.size.1))
    }

    /// Takes or gives back shortcuts that the compositor has for itself.
    pub fn set_grab(&mut self, held: bool) {
        let Some(seat) = &self.seat else { return };
        self.grab.set(held, &self.surface, seat, &self.handle);
        let title = if held {
            "Fanlight: Ctrl-Alt-G gives the keyboard back"
        } else {
            "Fanlight"
        };
        self.toplevel.set_title(title.into());
    }

    /// Puts the guest's cursor on a pointer that entered.
    pub fn show_cursor(&mut self, pointer: &WlPointer, serial: u32) {
        self.cursor.entered(pointer, serial);
    }
}

/// What a frame callback stands for.
#[derive(Clone, Copy, Debug)]
pub(super) struct FrameSerial(pub u64);

/// The type of the object that keeps the compositor from its own shortcuts.
pub(super) type Inhibitor = ZwpKeyboardShortcutsInhibitorV1;
