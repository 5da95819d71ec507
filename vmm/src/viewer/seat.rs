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

/// The seat's devices. Each object is told of everything: two keyboards would say each key twice.
#[derive(Debug, Default)]
pub struct SeatDevices {
    keyboard: Option<WlKeyboard>,
    pointer: Option<WlPointer>,
    touch: Option<WlTouch>,
}

/// What was scrolled since the compositor's last frame of the pointer: right, and down.
#[derive(Debug, Default)]
pub struct Scroll {
    /// In 120ths of a notch; only wheels, and only newer compositors, tell these.
    exact: [i32; 2],
    /// In the compositor's units.
    lengths: [f64; 2],
}

impl Scroll {
    /// What it comes to, in 120ths of a notch. A length that is less is kept for the next frame.
    fn take(&mut self) -> [i32; 2] {
        let exact = std::mem::take(&mut self.exact);
        let mut turned = [0; 2];
        for axis in 0..2 {
            let length = &mut self.lengths[axis];
            if exact[axis] != 0 {
                turned[axis] = exact[axis];
                *length = 0.0;
            } else {
                let parts = (*length / UNITS_A_NOTCH * NOTCH).trunc();
                turned[axis] = parts as i32;
                *length -= parts / NOTCH * UNITS_A_NOTCH;
            }
        }
        turned
    }
}

/// The place of an axis in a [`Scroll`].
fn side(axis: wl_pointer::Axis) -> usize {
    match axis {
        wl_pointer::Axis::HorizontalScroll => 0,
        _ => 1,
    }
}

impl Dispatch<WlSeat, ()> for State {
    fn event(
        state: &mut Self,
        seat: &WlSeat,
        event: wl_seat::Event,
        (): &(),
        _: &Connection,
        handle: &QueueHandle<Self>,
    ) {
        let wl_seat::Event::Capabilities { capabilities } = event else {
            return;
        };
        let has = match capabilities {
            WEnum::Value(has) => has,
            WEnum::Unknown(bits) => wl_seat::Capability::from_bits_truncate(bits),
        };
        let devices = &mut state.devices;
        if !has.contains(wl_seat::Capability::Keyboard) {
            if let Some(gone) = devices.keyboard.take() {
                gone.release();
                state.grab.forget();
                state.events.push(WindowEvent::Unfocused);
            }
        } else if devices.keyboard.is_none() {
            devices.keyboard = Some(seat.get_keyboard(handle, ()));
        }
        if !has.contains(wl_seat::Capability::Pointer) {
            if let Some(gone) = devices.pointer.take() {
                state.cursor.left();
                gone.release();
            }
        } else if devices.pointer.is_none() {
            devices.pointer = Some(seat.get_pointer(handle, ()));
        }
        if !has.contains(wl_seat::Capability::Touch) {
            if let Some(gone) = devices.touch.take() {
                gone.release();
                state.lift_fingers();
            }
        } else if devices.touch.is_none() {
            devices.touch = Some(seat.get_touch(handle, ()));
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
            wl_pointer::Event::AxisValue120 {
                axis: WEnum::Value(axis),
                value120,
            } => {
                let turned = &mut state.scroll.exact[side(axis)];
                *turned = turned.saturating_add(value120);
            }
            wl_pointer::Event::Axis {
                axis: WEnum::Value(axis),
                value,
                ..
            } => state.scroll.lengths[side(axis)] += value,
            wl_pointer::Event::Frame => {
                let [horizontal, vertical] = state.scroll.take();
                if (horizontal, vertical) != (0, 0) {
                    state.events.push(WindowEvent::Wheel {
                        horizontal,
                        vertical,
                    });
                }
            }
            _ => {}
        }
    }
}

impl State {
    /// No finger is on the window any more.
    fn lift_fingers(&mut self) {
        for id in std::mem::take(&mut self.touches.0) {
            self.events.push(WindowEvent::Touch { id, at: None });
        }
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
            wl_touch::Event::Cancel => return state.lift_fingers(),
            _ => return,
        };
        state.events.push(WindowEvent::Touch { id, at });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wheel_that_tells_notches_is_not_heard_twice() {
        let mut scroll = Scroll::default();
        (scroll.exact[1], scroll.lengths[1]) = (-120, -15.0);
        assert_eq!(scroll.take(), [0, -120]);
        assert_eq!(scroll.take(), [0, 0]);
        // Two fingers on a pad tell only lengths, and short ones.
        for length in [10.0, 0.05, 0.05] {
            scroll.lengths[0] += length;
        }
        assert_eq!(scroll.take(), [121, 0]);
        scroll.lengths[0] += 0.05;
        assert_eq!(scroll.take(), [0, 0]);
        scroll.lengths[0] += 0.05;
        assert_eq!(scroll.take(), [1, 0]);
    }

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
