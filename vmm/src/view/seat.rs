//! Keyboard, pointer and fingers: events of the compositor as what the user does.

use wayland_client::{
    Connection, Dispatch, QueueHandle, WEnum,
    protocol::{
        wl_keyboard::{self, WlKeyboard},
        wl_pointer::{self, WlPointer},
        wl_seat::{self, WlSeat},
        wl_surface::WlSurface,
        wl_touch::{self, WlTouch},
    },
};
use wayland_protocols::wp::keyboard_shortcuts_inhibit::zv1::client::zwp_keyboard_shortcuts_inhibit_manager_v1::ZwpKeyboardShortcutsInhibitManagerV1;

use super::window::{Inhibitor, State, WindowEvent};

/// Linux `input-event-codes.h`.
const KEY_LEFTCTRL: u32 = 29;
const KEY_RIGHTCTRL: u32 = 97;
const KEY_LEFTALT: u32 = 56;
const KEY_RIGHTALT: u32 = 100;
const KEY_G: u32 = 34;

/// A notch of a wheel that tells only lengths: Wayland's compositors say 10 of their units.
const UNITS_A_NOTCH: f64 = 10.0;
/// `axis_value120` of a notch.
const NOTCH: f64 = 120.0;

/// Whether the window has the compositor's own shortcuts too; Ctrl-Alt-G gives them back.
pub struct Grab {
    manager: Option<ZwpKeyboardShortcutsInhibitManagerV1>,
    inhibitor: Option<Inhibitor>,
    held: Vec<u32>,
}

impl Grab {
    /// Nothing is grabbed.
    pub fn new(manager: Option<ZwpKeyboardShortcutsInhibitManagerV1>) -> Self {
        Self {
            manager,
            inhibitor: None,
            held: Vec::new(),
        }
    }

    /// Whether shortcuts reach the guest.
    pub fn is_held(&self) -> bool {
        self.inhibitor.is_some()
    }

    /// Takes or gives back.
    pub(super) fn set(
        &mut self,
        held: bool,
        surface: &WlSurface,
        seat: &WlSeat,
        handle: &QueueHandle<State>,
    ) {
        if let Some(inhibitor) = self.inhibitor.take() {
            inhibitor.destroy();
        }
        if let (true, Some(manager)) = (held, &self.manager) {
            self.inhibitor = Some(manager.inhibit_shortcuts(surface, seat, handle, ()));
        }
    }

    /// Keeps the books of keys that are down; whether this key, pressed, is Ctrl-Alt-G.
    fn key(&mut self, code: u32, pressed: bool) -> bool {
        self.held.retain(|&held| held != code);
        let any = |codes: [u32; 2]| codes.iter().any(|code| self.held.contains(code));
        let chord = pressed
            && code == KEY_G
            && any([KEY_LEFTCTRL, KEY_RIGHTCTRL])
            && any([KEY_LEFTALT, KEY_RIGHTALT]);
        if pressed {
            self.held.push(code);
        }
        chord
    }

    /// All keys are up, as far as this window is concerned.
    fn forget(&mut self) {
        self.held.clear();
    }
}

/// Fingers on the window.
#[derive(Debug, Default)]
pub struct Touches(Vec<i32>);

impl Dispatch<WlSeat, ()> for State {
    fn event(
        _: &mut Self,
        seat: &WlSeat,
        event: wl_seat::Event,
        (): &(),
        _: &Connection,
        handle: &QueueHandle<Self>,
    ) {
        let wl_seat::Event::Capabilities {
            capabilities: WEnum::Value(has),
        } = event
        else {
            return;
        };
        // A seat that loses a device and gets it back gives a new object; the old one stays silent.
        if has.contains(wl_seat::Capability::Keyboard) {
            seat.get_keyboard(handle, ());
        }
        if has.contains(wl_seat::Capability::Pointer) {
            seat.get_pointer(handle, ());
        }
        if has.contains(wl_seat::Capability::Touch) {
            seat.get_touch(handle, ());
        }
    }
}

impl Dispatch<WlKeyboard, ()> for State {
    fn event(
        state: &mut Self,
        _: &WlKeyboard,
        event: wl_keyboard::Event,
        (): &(),
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
        match event {
            wl_keyboard::Event::Key {
                key,
                state: WEnum::Value(change),
                ..
            } => {
                let pressed = change == wl_keyboard::KeyState::Pressed;
                if state.grab.key(key, pressed) {
                    let held = state.grab.is_held();
                    state.set_grab(!held);
                }
                state.events.push(WindowEvent::Key { code: key, pressed });
            }
            wl_keyboard::Event::Leave { .. } => {
                state.grab.forget();
                state.events.push(WindowEvent::Unfocused);
            }
            _ => {}
        }
    }
}

impl Dispatch<WlPointer, ()> for State {
    fn event(
        state: &mut Self,
        pointer: &WlPointer,
        event: wl_pointer::Event,
        (): &(),
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
        match event {
            wl_pointer::Event::Enter {
                serial,
                surface,
                surface_x,
                surface_y,
            } if state.is_window(&surface) => {
                state.show_cursor(pointer, serial);
                let (x, y) = state.place(surface_x, surface_y);
                state.events.push(WindowEvent::Pointer { x, y });
            }
            wl_pointer::Event::Motion {
                surface_x,
                surface_y,
                ..
            } => {
                let (x, y) = state.place(surface_x, surface_y);
                state.events.push(WindowEvent::Pointer { x, y });
            }
            wl_pointer::Event::Button {
                button,
                state: WEnum::Value(change),
                ..
            } => {
                let pressed = change == wl_pointer::ButtonState::Pressed;
                if pressed && !state.grab.is_held() {
                    state.set_grab(true);
                }
                state.events.push(WindowEvent::Button {
                    code: button,
                    pressed,
                });
            }
            // Both are told of one turn of a wheel; only the newer compositors tell the first.
            wl_pointer::Event::AxisValue120 {
                axis: WEnum::Value(axis),
                value120,
            } => state.wheel(axis, value120),
            wl_pointer::Event::Axis {
                axis: WEnum::Value(axis),
                value,
                ..
            } if !state.exact_wheel() => {
                state.wheel(axis, (value / UNITS_A_NOTCH * NOTCH) as i32);
            }
            _ => {}
        }
    }
}

impl State {
    /// Whether the compositor tells turns of a wheel in parts of notches.
    fn exact_wheel(&self) -> bool {
        use wayland_client::Proxy;
        self.seat
            .as_ref()
            .is_some_and(|seat| seat.version() >= wl_pointer::EVT_AXIS_VALUE120_SINCE)
    }

    fn wheel(&mut self, axis: wl_pointer::Axis, value120: i32) {
        let (horizontal, vertical) = match axis {
            wl_pointer::Axis::HorizontalScroll => (value120, 0),
            _ => (0, value120),
        };
        self.events.push(WindowEvent::Wheel {
            horizontal,
            vertical,
        });
    }
}

impl Dispatch<WlTouch, ()> for State {
    fn event(
        state: &mut Self,
        _: &WlTouch,
        event: wl_touch::Event,
        (): &(),
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
        let (id, at) = match event {
            wl_touch::Event::Down { id, x, y, .. } => {
                state.touches.0.push(id);
                (id, Some(state.place(x, y)))
            }
            wl_touch::Event::Motion { id, x, y, .. } => (id, Some(state.place(x, y))),
            wl_touch::Event::Up { id, .. } => {
                state.touches.0.retain(|&finger| finger != id);
                (id, None)
            }
            wl_touch::Event::Cancel => {
                for id in std::mem::take(&mut state.touches.0) {
                    state.events.push(WindowEvent::Touch { id, at: None });
                }
                return;
            }
            _ => return,
        };
        state.events.push(WindowEvent::Touch { id, at });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_control_alt_g_is_the_chord() {
        let mut grab = Grab::new(None);
        assert!(!grab.key(KEY_G, true));
        assert!(!grab.key(KEY_G, false));
        assert!(!grab.key(KEY_LEFTCTRL, true));
        assert!(!grab.key(KEY_G, true));
        assert!(!grab.key(KEY_RIGHTALT, true));
        assert!(grab.key(KEY_G, true));
        grab.forget();
        assert!(!grab.key(KEY_G, true));
    }
}
