//! Keyboard, pointer and touch screen of the compositor's seat: their events become [`WindowEvent`]s.

use wayland_client::{
    Connection, Dispatch, QueueHandle, WEnum,
    protocol::{
        wl_keyboard::{self, WlKeyboard},
        wl_pointer::{self, WlPointer},
        wl_seat::{self, WlSeat},
        wl_touch::{self, WlTouch},
    },
};

use super::{events::WindowEvent, scroll::index, state::State};

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
                state.cursor.leave();
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
                // The guest gets the keys of Ctrl-Alt-G too.
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
                let (x, y) = state.part(surface_x, surface_y);
                state.events.push(WindowEvent::Pointer { x, y });
            }
            wl_pointer::Event::Motion {
                surface_x,
                surface_y,
                ..
            } => {
                let (x, y) = state.part(surface_x, surface_y);
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
                let turned = &mut state.scroll.exact[index(axis)];
                *turned = turned.saturating_add(value120);
            }
            wl_pointer::Event::Axis {
                axis: WEnum::Value(axis),
                value,
                ..
            } => state.scroll.lengths[index(axis)] += value,
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
    /// All fingers leave the window.
    fn lift_fingers(&mut self) {
        for id in std::mem::take(&mut self.touches) {
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
                state.touches.push(id);
                (id, Some(state.part(x, y)))
            }
            wl_touch::Event::Motion { id, x, y, .. } => (id, Some(state.part(x, y))),
            wl_touch::Event::Up { id, .. } => {
                state.touches.retain(|&finger| finger != id);
                (id, None)
            }
            wl_touch::Event::Cancel => return state.lift_fingers(),
            _ => return,
        };
        state.events.push(WindowEvent::Touch { id, at });
    }
}
