//! Console device (Virtio 1.3, 5.3): one port, with the terminal's size.

use std::{
    collections::VecDeque,
    io::{self, Write},
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, MutexGuard},
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::{Immutable, IntoBytes, little_endian};

use super::{
    ActivateError, Activation, DeviceQueue, DeviceStatus, QueueError, QueueHandler, VirtioDevice,
    Worker, read_bytes,
};

use crate::sync::Mutex;

const VIRTIO_CONSOLE_F_SIZE: u64 = 1 << 0;
const QUEUE_SIZES: &[u16] = &[64, 64];
const RECEIVE_QUEUE: u16 = 0;
const TRANSMIT_QUEUE: u16 = 1;

/// Input that waits for the guest: about what a person types or pastes. A program waits for room.
const INPUT_CAPACITY: usize = 64 << 10;
/// The most output taken from one request at a time.
const OUTPUT_CHUNK: u64 = 64 << 10;

/// Device configuration (`struct virtio_console_config`).
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    cols: little_endian::U16,
    rows: little_endian::U16,
    max_nr_ports: little_endian::U32,
    emerg_wr: little_endian::U32,
}

/// State that the device, its thread and its handle share.
#[derive(Debug)]
struct Shared {
    input: Mutex<VecDeque<u8>>,
    /// Signalled when there is input.
    data: EventFd,
    /// Signalled when the guest has taken all input.
    room: EventFd,
    config: Mutex<(Config, Option<DeviceStatus>)>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock()
}

/// The host side of a console.
#[derive(Clone, Debug)]
pub struct ConsoleHandle(Arc<Shared>);

impl ConsoleHandle {
    /// Gives input to the guest; returns how many bytes found room.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut input = locked(&self.0.input);
        let taken = bytes.len().min(INPUT_CAPACITY - input.len());
        input.extend(&bytes[..taken]);
        drop(input);
        if taken > 0
            && let Err(error) = self.0.data.write(1)
        {
            tracing::error!(%error, "cannot pass console input on");
        }
        taken
    }

    /// Tells the guest the size of the terminal, in characters.
    pub fn resize(&self, cols: u16, rows: u16) {
        let mut config = locked(&self.0.config);
        config.0.cols = cols.into();
        config.0.rows = rows.into();
        if let Some(status) = &config.1 {
            status.config_changed();
        }
    }
}

/// The console device.
pub struct Console {
    shared: Arc<Shared>,
    output: Box<dyn FnMut() -> Box<dyn Write + Send> + Send>,
    workers: Vec<Worker>,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").finish_non_exhaustive()
    }
}

impl Console {
    /// A console that sends to `output`, which must not block, and signals `room` when the guest has taken
    /// all input.
    pub fn new(
        output: impl Write + Clone + Send + 'static,
        room: EventFd,
    ) -> io::Result<(Self, ConsoleHandle)> {
        let shared = Arc::new(Shared {
            input: Mutex::default(),
            data: EventFd::new(EFD_NONBLOCK)?,
            room,
            config: Mutex::default(),
        });
        let handle = ConsoleHandle(shared.clone());
        let console = Self {
            shared,
            output: Box::new(move || Box::new(output.clone())),
            workers: Vec::new(),
        };
        Ok((console, handle))
    }
}

impl VirtioDevice for Console {
    fn device_id(&self) -> u32 {
        3
    }

    fn name(&self) -> &'static str {
        "console"
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        VIRTIO_CONSOLE_F_SIZE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(locked(&self.shared.config).0.as_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let receive = Receive {
            queue: activation.take_queue(RECEIVE_QUEUE)?,
            shared: self.shared.clone(),
        };
        let transmit = Transmit {
            queue: activation.take_queue(TRANSMIT_QUEUE)?,
            output: (self.output)(),
        };
        locked(&self.shared.config).1 = Some(activation.status.clone());
        self.workers = vec![
            Worker::spawn("console-in", activation.status.clone(), receive)?,
            Worker::spawn("console-out", activation.status, transmit)?,
        ];
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.clear();
        locked(&self.shared.config).1 = None;
    }
}

struct Receive {
    queue: DeviceQueue,
    shared: Arc<Shared>,
}

impl QueueHandler for Receive {
    fn sources(&self) -> Vec<RawFd> {
        vec![self.queue.kick().as_raw_fd(), self.shared.data.as_raw_fd()]
    }

    fn ready(&mut self, _source: usize) -> Result<(), QueueError> {
        self.queue.clear_kick();
        let _ = self.shared.data.read();
        let mut gave = false;
        loop {
            let mut input = locked(&self.shared.input);
            if input.is_empty() {
                break;
            }
            let Some(request) = self.queue.pop()? else {
                return Ok(());
            };
            let len = request.writable.len().min(input.len() as u64) as usize;
            let bytes: Vec<u8> = input.drain(..len).collect();
            drop(input);
            let written = request
                .writable
                .write(self.queue.memory(), &bytes)
                .unwrap_or(0);
            self.queue.push(request.head, written as u32)?;
            gave = true;
        }
        if gave {
            self.shared
                .room
                .write(1)
                .map_err(|source| QueueError::Host {
                    action: "ask for more console input",
                    source,
                })?;
        }
        Ok(())
    }
}

struct Transmit {
    queue: DeviceQueue,
    output: Box<dyn Write + Send>,
}

impl QueueHandler for Transmit {
    fn sources(&self) -> Vec<RawFd> {
        vec![self.queue.kick().as_raw_fd()]
    }

    fn ready(&mut self, _source: usize) -> Result<(), QueueError> {
        self.queue.clear_kick();
        let Self { queue, output } = self;
        queue.drain(|mem, mut request| {
            // The queue bounds the number of buffers, but not what each of them holds.
            while !request.readable.is_empty() {
                let part = request.readable.take_front(OUTPUT_CHUNK);
                let mut bytes = vec![0; part.len() as usize];
                if part.read(mem, &mut bytes).is_ok()
                    && let Err(error) = output.write_all(&bytes)
                {
                    tracing::warn!(%error, "console output was lost");
                }
            }
            Ok(0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::test_util::{Driver, WRITE};

    #[derive(Clone, Default)]
    struct Collect(Arc<Mutex<Vec<u8>>>);

    impl Write for Collect {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn bytes_pass_both_ways_and_room_is_told() {
        let (mut driver, out) = (Driver::new(2), Collect::default());
        let room = EventFd::new(0).unwrap();
        let (mut console, handle) = Console::new(out.clone(), room.try_clone().unwrap()).unwrap();
        assert_eq!(handle.input(b"early"), 5);
        console.activate(driver.activation()).unwrap();
        let used = driver.request(0, &[(0x10_0000, 64, WRITE)]);
        assert_eq!(driver.read(0x10_0000, used as usize), b"early");
        assert_eq!(room.read().unwrap(), 1);
        driver.write(0x20_0000, b"out");
        driver.request(1, &[(0x20_0000, 3, 0)]);
        assert_eq!(*out.0.lock(), b"out");
        console.reset();
    }

    #[test]
    fn input_longer_than_a_buffer_continues_in_the_next() {
        let mut driver = Driver::new(2);
        let room = EventFd::new(0).unwrap();
        let (mut console, handle) = Console::new(Collect::default(), room).unwrap();
        console.activate(driver.activation()).unwrap();
        let input: Vec<u8> = (0..100).collect();
        assert_eq!(handle.input(&input), 100);
        let mut came = Vec::new();
        for len in [64, 36] {
            assert_eq!(driver.request(0, &[(0x10_0000, 64, WRITE)]), len);
            came.extend(driver.read(0x10_0000, len as usize));
        }
        assert_eq!(came, input);
    }

    #[test]
    fn input_is_bounded() {
        let room = EventFd::new(0).unwrap();
        let (_console, handle) = Console::new(Collect::default(), room).unwrap();
        assert_eq!(handle.input(&vec![0; 2 * INPUT_CAPACITY]), INPUT_CAPACITY);
        assert_eq!(handle.input(b"x"), 0);
    }

    #[test]
    fn a_resize_changes_the_configuration_and_its_generation() {
        let driver = Driver::new(2);
        let room = EventFd::new(0).unwrap();
        let (mut console, handle) = Console::new(Collect::default(), room).unwrap();
        console.activate(driver.activation()).unwrap();
        handle.resize(132, 50);
        let mut size = [0; 4];
        console.read_config(0, &mut size);
        assert_eq!(size, [132, 0, 50, 0]);
        assert_eq!(driver.status.generation(), 1);
    }
}
