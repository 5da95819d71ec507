//! Input from a viewer, as events of the guest's keyboard, pointer and touch screen.

use std::{collections::BTreeSet, sync::Arc};

use fanlight_api::display::ViewerMessage;
use fanlight_devices::{
    sync::Mutex,
    virtio::{
        gpu::{DisplayHandle, Mode},
        input::{
            ABS_MT_POSITION_X, ABS_MT_POSITION_Y, ABS_MT_SLOT, ABS_MT_TRACKING_ID, ABS_X, ABS_Y,
            AXIS_MAX, BTN_TOUCH, EV_ABS, EV_KEY, EV_REL, InputEvent, InputHandle, REL_HWHEEL,
            REL_HWHEEL_HI_RES, REL_WHEEL, REL_WHEEL_HI_RES, TOUCHES,
        },
    },
};

/// High-resolution units of one wheel notch.
const NOTCH: i32 = 120;
/// The longest turn that is passed on; no wheel turns further at once.
const MAX_TURN: i32 = 100 * NOTCH;
/// Tracking ids count up to here and start again at 0.
const TRACKING_IDS: i32 = 0x1_0000;

/// The guest's keyboard, pointer and touch screen.
#[derive(Clone, Debug)]
pub struct Inputs {
    display: DisplayHandle,
    devices: [InputHandle; 3],
    state: Arc<Mutex<State>>,
}

/// Pressed keys, buttons and fingers, so that they can be released.
#[derive(Debug, Default)]
struct State {
    keys: BTreeSet<u16>,
    buttons: BTreeSet<u16>,
    /// Parts of a notch that were not reported yet: right, down.
    wheels: [i32; 2],
    /// The finger in each slot.
    fingers: [Option<i32>; TOUCHES as usize],
    touches: i32,
}

impl Inputs {
    /// Keyboard, pointer and touch screen, in this order.
    pub fn new(display: DisplayHandle, devices: [InputHandle; 3]) -> Self {
        Self {
            display,
            devices,
            state: Arc::default(),
        }
    }

    /// Sends a message of the viewer to the device that it is for. Codes that the device lacks are dropped.
    pub fn take(&self, message: &ViewerMessage) {
        let mut state = self.state.lock();
        let [keyboard, pointer, touch] = &self.devices;
        match *message {
            ViewerMessage::Key { code, pressed } => {
                track(&mut state.keys, code, pressed);
                send(keyboard, &[event(EV_KEY, code, pressed.into())]);
            }
            ViewerMessage::Button { code, pressed } => {
                track(&mut state.buttons, code, pressed);
                send(pointer, &[event(EV_KEY, code, pressed.into())]);
            }
            ViewerMessage::Pointer { output, x, y } => {
                if let Some((x, y)) = self.axes(output, x, y) {
                    send(pointer, &[event(EV_ABS, ABS_X, x), event(EV_ABS, ABS_Y, y)]);
                }
            }
            ViewerMessage::Wheel {
                horizontal,
                vertical,
            } => send(pointer, &turn(&mut state.wheels, horizontal, vertical)),
            ViewerMessage::Touch { output, finger, at } => {
                let at = at.map(|[x, y]| self.axes(output, x, y));
                if at != Some(None) {
                    send(touch, &state.touch(finger, at.flatten()));
                }
            }
            ViewerMessage::Unfocused => {
                drop(state);
                self.release_all();
            }
            ViewerMessage::Release { .. }
            | ViewerMessage::CopyDeviceMemory
            | ViewerMessage::Resize { .. } => {}
        }
    }

    /// Releases all keys, buttons and fingers.
    pub fn release_all(&self) {
        let mut state = self.state.lock();
        let [keyboard, pointer, touch] = &self.devices;
        for code in std::mem::take(&mut state.keys) {
            send(keyboard, &[event(EV_KEY, code, 0)]);
        }
        for code in std::mem::take(&mut state.buttons) {
            send(pointer, &[event(EV_KEY, code, 0)]);
        }
        for finger in state.fingers.into_iter().flatten() {
            send(touch, &state.touch(finger, None));
        }
        state.wheels = [0, 0];
    }

    fn axes(&self, output: u32, x: f64, y: f64) -> Option<(i32, i32)> {
        let outputs = self.display.outputs();
        let connected: Vec<_> = outputs
            .iter()
            .filter(|info| info.output.connected)
            .map(|info| (info.index, info.output.mode))
            .collect();
        position(&connected, output as usize, x, y)
    }
}

/// A position on an output as values of the guest's axes, which span all connected outputs side by side.
fn position(connected: &[(usize, Mode)], output: usize, x: f64, y: f64) -> Option<(i32, i32)> {
    let (_, this) = connected.iter().find(|(index, _)| *index == output)?;
    let width = |(_, mode): &(usize, Mode)| f64::from(mode.width);
    let before = connected.iter().filter(|(index, _)| *index < output);
    let left: f64 = before.map(width).sum();
    let all: f64 = connected.iter().map(width).sum();
    let highest = connected.iter().map(|(_, mode)| mode.height).max()?;
    let x = (left + clamped(x) * f64::from(this.width)) / all;
    let y = clamped(y) * f64::from(this.height) / f64::from(highest);
    let axis = |part: f64| (part * f64::from(AXIS_MAX)) as i32;
    Some((axis(x), axis(y)))
}

/// A part of a side, 0 to 1; NaN is 0.
fn clamped(part: f64) -> f64 {
    if part.is_nan() {
        0.0
    } else {
        part.clamp(0.0, 1.0)
    }
}

fn event(type_: u16, code: u16, value: i32) -> InputEvent {
    InputEvent { type_, code, value }
}

fn track(down: &mut BTreeSet<u16>, code: u16, pressed: bool) {
    if pressed {
        down.insert(code);
    } else {
        down.remove(&code);
    }
}

fn send(device: &InputHandle, report: &[InputEvent]) {
    if let Err(error) = device.send(report) {
        tracing::debug!(%error, "the guest's input device takes no event");
    }
}

/// A turn of the wheels, in high-resolution units and in whole notches. The guest counts up as positive.
fn turn(rests: &mut [i32; 2], horizontal: i32, vertical: i32) -> Vec<InputEvent> {
    let wheels = [
        (horizontal, 1, REL_HWHEEL_HI_RES, REL_HWHEEL),
        (vertical, -1, REL_WHEEL_HI_RES, REL_WHEEL),
    ];
    let mut report = Vec::new();
    for (rest, (turn, sign, fine, coarse)) in rests.iter_mut().zip(wheels) {
        let turn = turn.clamp(-MAX_TURN, MAX_TURN) * sign;
        if turn == 0 {
            continue;
        }
        report.push(event(EV_REL, fine, turn));
        *rest += turn;
        if *rest / NOTCH != 0 {
            report.push(event(EV_REL, coarse, *rest / NOTCH));
            *rest %= NOTCH;
        }
    }
    report
}

impl State {
    /// A finger touches, moves or leaves. Without a free slot it is ignored.
    fn touch(&mut self, finger: i32, at: Option<(i32, i32)>) -> Vec<InputEvent> {
        let slot_of = |wanted| self.fingers.iter().position(|&finger| finger == wanted);
        let held = slot_of(Some(finger));
        let Some(slot) = held.or_else(|| at.and_then(|_| slot_of(None))) else {
            return Vec::new();
        };
        let mut report = vec![event(EV_ABS, ABS_MT_SLOT, slot as i32)];
        let before = self.fingers.iter().flatten().count();
        match at {
            None => {
                self.fingers[slot] = None;
                report.push(event(EV_ABS, ABS_MT_TRACKING_ID, -1));
            }
            Some((x, y)) => {
                if held.is_none() {
                    self.fingers[slot] = Some(finger);
                    report.push(event(EV_ABS, ABS_MT_TRACKING_ID, self.touches));
                    self.touches = (self.touches + 1) % TRACKING_IDS;
                }
                report.push(event(EV_ABS, ABS_MT_POSITION_X, x));
                report.push(event(EV_ABS, ABS_MT_POSITION_Y, y));
                // Programs without multi-touch follow the first finger.
                if slot == 0 {
                    report.push(event(EV_ABS, ABS_X, x));
                    report.push(event(EV_ABS, ABS_Y, y));
                }
            }
        }
        let after = self.fingers.iter().flatten().count();
        if (before == 0) != (after == 0) {
            report.push(event(EV_KEY, BTN_TOUCH, i32::from(after > 0)));
        }
        report
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notches_are_counted() {
        let mut rests = [0, 0];
        assert_eq!(turn(&mut rests, 0, 0), []);
        assert_eq!(
            turn(&mut rests, 0, 60),
            [event(EV_REL, REL_WHEEL_HI_RES, -60)]
        );
        assert_eq!(
            turn(&mut rests, 0, 70),
            [
                event(EV_REL, REL_WHEEL_HI_RES, -70),
                event(EV_REL, REL_WHEEL, -1)
            ]
        );
        assert_eq!(rests, [0, -10]);
        let absurd = turn(&mut rests, i32::MIN, i32::MAX);
        assert_eq!(absurd[0].value, -MAX_TURN);
    }

    #[test]
    fn fingers_have_slots_and_leave_them() {
        let mut state = State::default();
        let down = state.touch(77, Some((1, 2)));
        assert!(down.contains(&event(EV_KEY, BTN_TOUCH, 1)));
        assert!(down.contains(&event(EV_ABS, ABS_MT_TRACKING_ID, 0)));
        let second = state.touch(-5, Some((3, 4)));
        assert_eq!(second[0], event(EV_ABS, ABS_MT_SLOT, 1));
        assert!(!second.iter().any(|event| event.code == BTN_TOUCH));
        assert!(!state.touch(77, None).iter().any(|e| e.type_ == EV_KEY));
        assert!(state.touch(-5, None).contains(&event(EV_KEY, BTN_TOUCH, 0)));
        assert_eq!(state.touch(-5, None), []);
        for finger in 0..TOUCHES + 5 {
            let came = !state.touch(finger, Some((0, 0))).is_empty();
            assert_eq!(came, finger < TOUCHES);
        }
    }

    #[test]
    fn the_axes_span_all_outputs_side_by_side() {
        let mode = |width, height| Mode { width, height };
        let outputs = [(0, mode(640, 480)), (3, mode(1280, 960))];
        let third = |thirds: i32| AXIS_MAX * thirds / 3;
        assert_eq!(position(&outputs, 0, 0.0, 0.0), Some((0, 0)));
        let corner = (third(1), AXIS_MAX / 2);
        assert_eq!(position(&outputs, 0, 1.0, 1.0), Some(corner));
        assert_eq!(position(&outputs, 3, 0.0, 0.0), Some((third(1), 0)));
        let corner = (third(3), AXIS_MAX);
        assert_eq!(position(&outputs, 3, 1.0, 1.0), Some(corner));
        assert_eq!(position(&outputs, 1, 0.0, 0.0), None);
    }

    #[test]
    fn not_a_number_is_zero() {
        assert_eq!(clamped(f64::NAN), 0.0);
        assert_eq!(clamped(f64::INFINITY), 1.0);
        assert_eq!(clamped(-3.0), 0.0);
    }
}
