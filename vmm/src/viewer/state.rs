//! The window: its surface, the frame that it shows, and the devices of its seat.

use std::{collections::HashSet, io};

use wayland_client::{
    QueueHandle,
    globals::{BindError, GlobalList},
    protocol::{
        wl_buffer::WlBuffer, wl_compositor::WlCompositor, wl_keyboard::WlKeyboard,
        wl_pointer::WlPointer, wl_seat::WlSeat, wl_shm::WlShm, wl_surface::WlSurface,
        wl_touch::WlTouch,
    },
};
use wayland_protocols::{
    wp::{
        keyboard_shortcuts_inhibit::zv1::client::zwp_keyboard_shortcuts_inhibit_manager_v1::ZwpKeyboardShortcutsInhibitManagerV1,
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
    events::WindowEvent,
    frame::{CursorImage, Frame},
    grab::Grab,
    scroll::Scroll,
};

/// The serial of the damage that a frame callback is for.
#[derive(Clone, Copy, Debug)]
pub struct FrameSerial(pub u64);

/// The devices of the seat, one of each kind: each object gets every event, so that two keyboards would double each
/// key.
#[derive(Debug, Default)]
pub struct SeatDevices {
    /// The keyboard.
    pub keyboard: Option<WlKeyboard>,
    /// The pointer.
    pub pointer: Option<WlPointer>,
    /// The touch screen.
    pub touch: Option<WlTouch>,
}

/// The window and its devices. Events of the compositor change it.
pub struct State {
    handle: QueueHandle<State>,
    /// What happened since the last dispatch.
    pub events: Vec<WindowEvent>,
    surface: WlSurface,
    toplevel: XdgToplevel,
    viewport: Option<WpViewport>,
    /// Makes buffers of frames.
    pub buffers: Buffers,
    seat: Option<WlSeat>,
    /// Keyboard, pointer and touch screen.
    pub devices: SeatDevices,
    /// Scrolling that was not reported yet.
    pub scroll: Scroll,
    /// The grab of the compositor's shortcuts.
    pub grab: Grab,
    /// Fingers on the window.
    pub touches: Vec<i32>,
    /// The guest's cursor.
    pub cursor: CursorSurface,
    /// The window's size in pixels.
    size: (u32, u32),
    /// The size that the compositor proposed and `configure` has not applied yet.
    pub proposed: Option<(u32, u32)>,
    /// Whether the compositor has configured the window once.
    pub configured: bool,
    /// The buffer of the current frame.
    shown: Option<Buffer>,
    /// The guest shows nothing.
    blank: bool,
    /// Damage that was not committed yet.
    pending: Vec<[i32; 4]>,
    /// The serial of the last damage.
    serial: u64,
    /// Whether a committed frame was not shown yet.
    waiting: bool,
    /// Buffers that the compositor could not import.
    failed_imports: HashSet<u64>,
}

impl State {
    /// Makes the window's surfaces. It is shown once the compositor has configured it.
    pub fn new(
        globals: &GlobalList,
        handle: QueueHandle<Self>,
        title: &str,
        size: (u32, u32),
    ) -> Result<Self, BindError> {
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
        Ok(State {
            events: Vec::new(),
            cursor: CursorSurface::new(compositor.create_surface(&handle, ()), shm.clone()),
            buffers: Buffers::new(shm, dmabuf),
            grab: Grab::new(inhibit),
            touches: Vec::new(),
            devices: SeatDevices::default(),
            scroll: Scroll::default(),
            handle,
            surface,
            toplevel,
            viewport,
            seat,
            size,
            proposed: None,
            configured: false,
            shown: None,
            blank: true,
            pending: Vec::new(),
            serial: 0,
            waiting: false,
            failed_imports: HashSet::new(),
        })
    }

    /// Shows another frame, or black.
    ///
    /// A guest that shows nothing has a black window: a window without a buffer disappears. It could come back only
    /// after the compositor has configured it again (xdg-shell, xdg_surface).
    pub fn show(&mut self, frame: Option<Frame>) -> io::Result<()> {
        self.blank = frame.is_none();
        let buffer = match frame {
            Some(frame) => self.buffers.import(frame, &self.handle)?,
            None if self.viewport.is_some() => self.buffers.blank((1, 1), &self.handle)?,
            None => self.buffers.blank(self.size, &self.handle)?,
        };
        self.pending = vec![buffer.whole()];
        if buffer.is_unreadable() {
            self.events.push(WindowEvent::Unreadable);
        }
        self.shown = Some(buffer);
        self.present()
    }

    /// The frame changed: `areas` are x, y, width and height in pixels.
    pub fn damage(&mut self, areas: &[[i32; 4]], serial: u64) -> io::Result<()> {
        self.pending.extend_from_slice(areas);
        self.serial = serial;
        self.present()
    }

    /// The guest's cursor has another image, or is hidden.
    pub fn set_cursor(&mut self, image: Option<CursorImage>) -> io::Result<()> {
        self.cursor.set(image, &self.handle)
    }

    /// Commits the damage, unless the compositor has not shown the last commit yet.
    pub fn present(&mut self) -> io::Result<()> {
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

    /// The compositor has shown a commit and wants the next.
    pub fn frame_done(&mut self, serial: u64) {
        self.waiting = false;
        self.events.push(WindowEvent::Shown { serial });
        if let Err(error) = self.present() {
            tracing::error!(%error, "cannot show a frame");
        }
    }

    /// The compositor has imported a dma-buf, or could not.
    pub fn imported(&mut self, id: u64, wl_buffer: Option<WlBuffer>) {
        match (&mut self.shown, wl_buffer) {
            (Some(buffer), Some(wl_buffer)) if buffer.id() == id => buffer.imported(wl_buffer),
            (_, Some(wl_buffer)) => wl_buffer.destroy(),
            (_, None) => {
                self.failed_imports.insert(id);
            }
        }
        if let Err(error) = self.present() {
            tracing::error!(%error, "cannot show a frame");
        }
    }

    /// The compositor has released a buffer.
    pub fn buffer_released(&mut self) {
        if let Err(error) = self.present() {
            tracing::error!(%error, "cannot show a frame");
        }
    }

    /// Copies the frame if the compositor could not import it.
    pub fn retry_failed(&mut self) -> io::Result<()> {
        let failed = std::mem::take(&mut self.failed_imports);
        if let Some(buffer) = &mut self.shown
            && failed.contains(&buffer.id())
        {
            self.buffers.fall_back(buffer, &self.handle)?;
            if buffer.is_unreadable() {
                self.events.push(WindowEvent::Unreadable);
            }
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
            tracing::error!(%error, "cannot show a frame");
        }
    }

    /// Whether `surface` is the window's.
    pub fn is_window(&self, surface: &WlSurface) -> bool {
        *surface == self.surface
    }

    /// A position on the surface as parts of the window's size.
    pub fn part(&self, x: f64, y: f64) -> (f64, f64) {
        let part = |at: f64, size: u32| (at / f64::from(size.max(1))).clamp(0.0, 1.0);
        (part(x, self.size.0), part(y, self.size.1))
    }

    /// Takes the grab of the compositor's shortcuts, or releases it.
    pub fn set_grab(&mut self, held: bool) {
        let Some(seat) = &self.seat else { return };
        self.grab.set(held, &self.surface, seat, &self.handle);
        let title = if held {
            "Fanlight: Ctrl-Alt-G releases the keyboard"
        } else {
            "Fanlight"
        };
        self.toplevel.set_title(title.into());
    }

    /// Shows the guest's cursor on a pointer that entered.
    pub fn show_cursor(&mut self, pointer: &WlPointer, serial: u32) {
        self.cursor.enter(pointer, serial);
    }
}
