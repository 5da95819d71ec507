//! An input device, and the host's handle that sends it events.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, MutexGuard},
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout,
    little_endian::{U16, U32},
};

use super::{codes::*, event::InputEvent, kinds::InputKind};
use crate::sync::Mutex;
use crate::virtio::{
    ActivateError, Activation, DeviceQueue, QueueError, QueueHandler, VirtioDevice, Worker,
    read_bytes,
};

const EVENT_QUEUE: u16 = 0;
const STATUS_QUEUE: u16 = 1;
const QUEUE_SIZES: &[u16] = &[64, 64];
/// Events queued for the guest; a report that does not fit is refused.
const CAPACITY: usize = 1024;

/// `struct virtio_input_event` (5.8.6).
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct WireEvent {
    type_: U16,
    code: U16,
    value: U32,
}

/// `struct virtio_input_config` (5.8.4).
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct Config {
    select: u8,
    subsel: u8,
    size: u8,
    reserved: [u8; 5],
    data: [u8; 128],
}

/// Why input does not reach the guest.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum InputError {
    /// The device has no such key or axis.
    #[error("the {device} has no event of type {type_:#x} and code {code:#x}", device = kind.name(), type_ = event.type_, code = event.code)]
    Unknown {
        /// The kind of the device.
        kind: InputKind,
        /// The refused event.
        event: InputEvent,
    },
    /// The queue is full because the guest does not read it.
    #[error("the guest does not take the input that waits for it")]
    Full,
}

#[derive(Debug, Default)]
struct State {
    /// Whole reports.
    events: VecDeque<InputEvent>,
    /// Whether a driver reads events. Events queued without one would arrive late and all at once.
    active: bool,
    /// LEDs of a keyboard, one bit each.
    leds: u32,
}

#[derive(Debug)]
struct Shared {
    kind: InputKind,
    state: Mutex<State>,
    /// Signalled when there are events.
    data: EventFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

/// The host's handle of an input device, which outlives it, as a display's handle does.
#[derive(Clone, Debug)]
pub struct InputHandle(Arc<Shared>);

impl InputHandle {
    /// Creates the handle before its device exists.
    pub fn new(kind: InputKind) -> io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            kind,
            state: Mutex::default(),
            data: EventFd::new(EFD_NONBLOCK)?,
        })))
    }

    /// The kind of the device.
    pub fn kind(&self) -> InputKind {
        self.0.kind
    }

    /// Sends events that happen at once: the guest gets all of them or none. Without a driver they are dropped.
    pub fn send(&self, report: &[InputEvent]) -> Result<(), InputError> {
        let kind = self.0.kind;
        if let Some(&event) = report.iter().find(|event| !kind.has(event)) {
            return Err(InputError::Unknown { kind, event });
        }
        let mut state = self.0.lock();
        if !state.active || report.is_empty() {
            return Ok(());
        }
        if state.events.len() + report.len() + 1 > CAPACITY {
            return Err(InputError::Full);
        }
        state.events.extend(report);
        state.events.push_back(InputEvent {
            type_: EV_SYN,
            code: SYN_REPORT,
            value: 0,
        });
        drop(state);
        if let Err(error) = self.0.data.write(1) {
            tracing::error!(%error, "cannot pass input on");
        }
        Ok(())
    }

    /// LEDs that the guest has turned on: bit `LED_CAPSL` and so on.
    pub fn leds(&self) -> u32 {
        self.0.lock().leds
    }
}

/// An input device.
#[derive(Debug)]
pub struct Input {
    shared: Arc<Shared>,
    select: u8,
    subsel: u8,
    workers: Vec<Worker>,
}

impl Input {
    /// The device of `handle`.
    pub fn new(handle: &InputHandle) -> Self {
        Self {
            shared: handle.0.clone(),
            select: 0,
            subsel: 0,
            workers: Vec::new(),
        }
    }
}

impl VirtioDevice for Input {
    fn device_id(&self) -> u32 {
        18
    }

    fn name(&self) -> &'static str {
        self.shared.kind.name()
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = Config::new_zeroed();
        (config.select, config.subsel) = (self.select, self.subsel);
        let answer = self.shared.kind.describe(self.select, self.subsel);
        let len = answer.len().min(config.data.len());
        config.data[..len].copy_from_slice(&answer[..len]);
        config.size = len as u8;
        read_bytes(config.as_bytes(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[select]) => self.select = select,
            (1, &[subsel]) => self.subsel = subsel,
            (0, &[select, subsel]) => (self.select, self.subsel) = (select, subsel),
            _ => {}
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let events = Events {
            queue: activation.take_queue(EVENT_QUEUE)?,
            shared: self.shared.clone(),
        };
        let status = Status {
            queue: activation.take_queue(STATUS_QUEUE)?,
            shared: self.shared.clone(),
        };
        self.workers = vec![
            Worker::spawn("input-events", activation.status.clone(), events)?,
            Worker::spawn("input-status", activation.status, status)?,
        ];
        self.shared.lock().active = true;
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.clear();
        *self.shared.lock() = State::default();
        (self.select, self.subsel) = (0, 0);
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        self.reset();
    }
}

struct Events {
    queue: DeviceQueue,
    shared: Arc<Shared>,
}

impl QueueHandler for Events {
    fn sources(&self) -> Vec<RawFd> {
        vec![self.queue.kick().as_raw_fd(), self.shared.data.as_raw_fd()]
    }

    fn ready(&mut self, _source: usize) -> Result<(), QueueError> {
        self.queue.clear_kick();
        let _ = self.shared.data.read();
        loop {
            let Some(&event) = self.shared.lock().events.front() else {
                return Ok(());
            };
            let Some(request) = self.queue.pop()? else {
                return Ok(());
            };
            let wire = WireEvent {
                type_: event.type_.into(),
                code: event.code.into(),
                value: event.value.cast_unsigned().into(),
            };
            let written = request
                .writable
                .write(self.queue.memory(), wire.as_bytes())
                .unwrap_or(0);
            self.queue.push(request.head, written as u32)?;
            self.shared.lock().events.pop_front();
        }
    }
}

struct Status {
    queue: DeviceQueue,
    shared: Arc<Shared>,
}

impl QueueHandler for Status {
    fn sources(&self) -> Vec<RawFd> {
        vec![self.queue.kick().as_raw_fd()]
    }

    fn ready(&mut self, _source: usize) -> Result<(), QueueError> {
        self.queue.clear_kick();
        let shared = &self.shared;
        self.queue.drain(|mem, request| {
            let mut event = WireEvent::new_zeroed();
            let read = request.readable.read(mem, event.as_mut_bytes());
            let (type_, code) = (event.type_.get(), event.code.get());
            if read.is_ok() && type_ == EV_LED && code <= LED_MAX {
                let mut state = shared.lock();
                state.leds &= !(1 << code);
                state.leds |= u32::from(event.value.get() != 0) << code;
            }
            Ok(0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::kinds::{AXIS_MAX, TOUCHES},
        *,
    };
    use crate::virtio::test_util::{Driver, WRITE};

    fn key(code: u16, value: i32) -> InputEvent {
        InputEvent {
            type_: EV_KEY,
            code,
            value,
        }
    }

    fn device(kind: InputKind) -> (Input, InputHandle) {
        let handle = InputHandle::new(kind).unwrap();
        (Input::new(&handle), handle)
    }

    /// Reads device configuration as Linux reads it.
    fn ask(device: &mut Input, select: u8, subsel: u8) -> Vec<u8> {
        device.write_config(0, &[select]);
        device.write_config(1, &[subsel]);
        let mut size = [0];
        device.read_config(2, &mut size);
        let mut data = vec![0; size[0].into()];
        device.read_config(8, &mut data);
        data
    }

    fn has(bits: &[u8], code: u16) -> bool {
        let byte = bits.get(usize::from(code / 8)).copied().unwrap_or(0);
        byte >> (code % 8) & 1 == 1
    }

    #[test]
    fn structures_have_the_sizes_of_the_specification() {
        assert_eq!(size_of::<WireEvent>(), 8);
        assert_eq!(size_of::<Config>(), 136);
    }

    #[test]
    fn devices_say_what_they_are() {
        let (mut keyboard, _) = device(InputKind::Keyboard);
        assert_eq!(ask(&mut keyboard, 1, 0), b"Fanlight keyboard");
        let keys = ask(&mut keyboard, 0x11, EV_KEY as u8);
        assert!(has(&keys, KEY_A) && !has(&keys, BTN_LEFT) && !has(&keys, 0));
        assert!(has(&ask(&mut keyboard, 0x11, EV_LED as u8), LED_CAPSL));
        assert!(!ask(&mut keyboard, 0x11, EV_REP as u8).is_empty());
        assert!(ask(&mut keyboard, 0x11, EV_ABS as u8).is_empty());

        let (mut pointer, _) = device(InputKind::Pointer);
        assert!(has(&ask(&mut pointer, 0x11, EV_REL as u8), REL_WHEEL));
        let info = ask(&mut pointer, 0x12, ABS_X as u8);
        assert_eq!(info[4..8], AXIS_MAX.to_le_bytes());
        assert_eq!(info.len(), 20);
        assert!(ask(&mut pointer, 0x12, ABS_MT_SLOT as u8).is_empty());

        let (mut touch, _) = device(InputKind::Touch);
        let info = ask(&mut touch, 0x12, ABS_MT_SLOT as u8);
        assert_eq!(info[4..8], (TOUCHES - 1).to_le_bytes());
        assert!(has(&ask(&mut touch, 0x10, 0), INPUT_PROP_DIRECT));
        assert!(ask(&mut touch, 0xff, 0xff).is_empty());
    }

    #[test]
    fn reports_reach_the_guest_whole() {
        let mut driver = Driver::new(2);
        let (mut keyboard, handle) = device(InputKind::Keyboard);
        handle.send(&[key(KEY_A, 1)]).unwrap();
        keyboard.activate(driver.activation()).unwrap();
        handle.send(&[key(KEY_A, 1), key(30 + 1, 1)]).unwrap();
        let mut read = || {
            assert_eq!(driver.request(0, &[(0x10_0000, 8, WRITE)]), 8);
            driver.read(0x10_0000, 8)
        };
        assert_eq!(read(), [1, 0, 30, 0, 1, 0, 0, 0]);
        assert_eq!(read(), [1, 0, 31, 0, 1, 0, 0, 0]);
        assert_eq!(read(), [0; 8]);
        let pointer_event = InputEvent {
            type_: EV_ABS,
            code: ABS_X,
            value: 1,
        };
        assert!(matches!(
            handle.send(&[pointer_event]),
            Err(InputError::Unknown { .. })
        ));
    }

    #[test]
    fn input_that_nobody_takes_is_refused_at_last_and_gone_after_a_reset() {
        let driver = Driver::new(2);
        let (mut keyboard, handle) = device(InputKind::Keyboard);
        keyboard.activate(driver.activation()).unwrap();
        let sent = (0..CAPACITY)
            .take_while(|_| handle.send(&[key(KEY_A, 1)]).is_ok())
            .count();
        assert_eq!(sent, CAPACITY / 2);
        assert_eq!(handle.send(&[key(KEY_A, 0)]), Err(InputError::Full));
        keyboard.reset();
        assert!(handle.0.lock().events.is_empty());
    }

    #[test]
    fn lights_are_seen() {
        let mut driver = Driver::new(2);
        let (mut keyboard, handle) = device(InputKind::Keyboard);
        keyboard.activate(driver.activation()).unwrap();
        for (code, value, leds) in [(LED_CAPSL, 1, 2), (LED_CAPSL, 0, 0), (99, 1, 0)] {
            let event = WireEvent {
                type_: EV_LED.into(),
                code: code.into(),
                value: value.into(),
            };
            driver.write(0x10_0000, event.as_bytes());
            driver.request(1, &[(0x10_0000, 8, 0)]);
            assert_eq!(handle.leds(), leds);
        }
        driver.request(1, &[(0x10_0000, 3, 0)]);
        assert!(!driver.status.needs_reset());
    }
}
