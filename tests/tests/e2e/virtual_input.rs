//! A virtual keyboard and pointer, which a Wayland compositor accepts from a program.

use std::{
    io::Write,
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
};

use fanlight_tests::{Context, Result};
use rustix::fs::{MemfdFlags, memfd_create};
use wayland_client::{
    Connection, Dispatch, EventQueue, QueueHandle, delegate_noop,
    globals::{GlobalListContents, registry_queue_init},
    protocol::{
        wl_keyboard, wl_pointer,
        wl_registry::{self, WlRegistry},
        wl_seat::WlSeat,
    },
};
use wayland_protocols_misc::zwp_virtual_keyboard_v1::client::{
    zwp_virtual_keyboard_manager_v1::ZwpVirtualKeyboardManagerV1,
    zwp_virtual_keyboard_v1::ZwpVirtualKeyboardV1,
};
use wayland_protocols_wlr::virtual_pointer::v1::client::{
    zwlr_virtual_pointer_manager_v1::ZwlrVirtualPointerManagerV1,
    zwlr_virtual_pointer_v1::ZwlrVirtualPointerV1,
};

/// A standard keyboard; the compositor finds the components in its own files.
const KEYMAP: &str = "xkb_keymap {
    xkb_keycodes { include \"evdev+aliases(qwerty)\" };
    xkb_types { include \"complete\" };
    xkb_compat { include \"complete\" };
    xkb_symbols { include \"pc+us+inet(evdev)\" };
};\0";
/// Modifier bits of this keymap by Linux key code: Ctrl, Alt and Super.
const MODIFIERS: [(u32, u32); 3] = [(29, 1 << 2), (56, 1 << 3), (125, 1 << 6)];

struct State;

delegate_noop!(State: ignore WlSeat);
delegate_noop!(State: ZwpVirtualKeyboardManagerV1);
delegate_noop!(State: ZwpVirtualKeyboardV1);
delegate_noop!(State: ZwlrVirtualPointerManagerV1);
delegate_noop!(State: ZwlrVirtualPointerV1);

impl Dispatch<WlRegistry, GlobalListContents> for State {
    fn event(
        _: &mut Self,
        _: &WlRegistry,
        _: wl_registry::Event,
        _: &GlobalListContents,
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
    }
}

/// The virtual devices.
pub struct VirtualInput {
    queue: EventQueue<State>,
    keyboard: ZwpVirtualKeyboardV1,
    pointer: ZwlrVirtualPointerV1,
    modifiers: u32,
    time: u32,
}

impl VirtualInput {
    /// Adds both to the seat of the compositor that listens at `socket`.
    pub fn plug_in(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).context("cannot connect to the compositor")?;
        let connection = Connection::from_socket(stream).context("no Wayland connection")?;
        let (globals, mut queue) =
            registry_queue_init::<State>(&connection).context("the compositor does not answer")?;
        let handle = queue.handle();
        let seat: WlSeat = globals.bind(&handle, 1..=1, ()).context("no seat")?;
        let keyboards: ZwpVirtualKeyboardManagerV1 = globals
            .bind(&handle, 1..=1, ())
            .context("no virtual keyboards")?;
        let pointers: ZwlrVirtualPointerManagerV1 = globals
            .bind(&handle, 1..=2, ())
            .context("no virtual pointers")?;
        let keyboard = keyboards.create_virtual_keyboard(&seat, &handle, ());
        let mut map = std::fs::File::from(
            memfd_create("keymap", MemfdFlags::CLOEXEC).context("cannot make a memfd")?,
        );
        map.write_all(KEYMAP.as_bytes())
            .context("cannot write a keymap")?;
        let format = wl_keyboard::KeymapFormat::XkbV1;
        keyboard.keymap(format as u32, map.as_fd(), KEYMAP.len() as u32);
        let pointer = pointers.create_virtual_pointer(Some(&seat), &handle, ());
        queue
            .roundtrip(&mut State)
            .context("the compositor refuses the devices")?;
        Ok(Self {
            queue,
            keyboard,
            pointer,
            modifiers: 0,
            time: 0,
        })
    }

    fn sent(&mut self) -> Result<()> {
        self.time += 1;
        let heard = self.queue.roundtrip(&mut State);
        heard
            .map(drop)
            .context("the compositor does not accept input")
    }

    /// A key by its code in Linux's `input-event-codes.h`; it updates the modifiers.
    pub fn key(&mut self, code: u32, pressed: bool) -> Result<()> {
        self.keyboard.key(self.time, code, pressed.into());
        if let Some((_, bit)) = MODIFIERS.iter().find(|(modifier, _)| *modifier == code) {
            self.modifiers = if pressed {
                self.modifiers | bit
            } else {
                self.modifiers & !bit
            };
            self.keyboard.modifiers(self.modifiers, 0, 0, 0);
        }
        self.sent()
    }

    /// Presses keys in order, and releases them in reverse order.
    pub fn chord(&mut self, codes: &[u32]) -> Result<()> {
        for &code in codes {
            self.key(code, true)?;
        }
        codes
            .iter()
            .rev()
            .try_for_each(|&code| self.key(code, false))
    }

    /// Moves the pointer to a position on an output of this size.
    pub fn move_to(&mut self, x: u32, y: u32, width: u32, height: u32) -> Result<()> {
        self.pointer.motion_absolute(self.time, x, y, width, height);
        self.pointer.frame();
        self.sent()
    }

    /// Presses or releases a pointer button.
    pub fn button(&mut self, code: u32, pressed: bool) -> Result<()> {
        let state = if pressed {
            wl_pointer::ButtonState::Pressed
        } else {
            wl_pointer::ButtonState::Released
        };
        self.pointer.button(self.time, code, state);
        self.pointer.frame();
        self.sent()
    }

    /// Turns the wheel by notches, to the right or down.
    pub fn wheel(&mut self, axis: wl_pointer::Axis, notches: i32) -> Result<()> {
        self.pointer.axis_source(wl_pointer::AxisSource::Wheel);
        let length = f64::from(notches) * 15.0;
        self.pointer.axis_discrete(self.time, axis, length, notches);
        self.pointer.frame();
        self.sent()
    }

    /// Scrolls down with two fingers on a touch pad.
    pub fn scroll(&mut self, length: f64) -> Result<()> {
        self.pointer.axis_source(wl_pointer::AxisSource::Finger);
        let axis = wl_pointer::Axis::VerticalScroll;
        self.pointer.axis(self.time, axis, length);
        self.pointer.frame();
        self.sent()
    }
}
