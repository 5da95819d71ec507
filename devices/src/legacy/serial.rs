//! The first serial port: a 16550A of vm-superio between the guest's port accesses and an
//! [`Output`](super::output::Output).

use std::{io::Write, sync::MutexGuard};

use vm_superio::{Serial, serial::SerialEvents};
use vmm_sys_util::eventfd::EventFd;

use super::interrupt_line::InterruptLine;
use crate::{memory::IoHandler, sync::Mutex};

/// How many ports the device answers.
pub const PORTS: u64 = 8;

type Uart = Serial<InterruptLine, Room, Box<dyn Write + Send>>;

/// Signals that the guest has read all of its input.
struct Room(EventFd);

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        if let Err(error) = self.0.write(1) {
            tracing::error!(%error, "cannot ask for more serial input");
        }
    }
}

/// A serial port.
pub struct SerialPort(Mutex<Uart>);

impl SerialPort {
    /// A port that raises `interrupt`, sends to `output`, which must not block, and signals `room`
    /// when the guest has read all input.
    pub fn new(interrupt: EventFd, output: Box<dyn Write + Send>, room: EventFd) -> Self {
        Self(Mutex::new(Serial::with_events(
            InterruptLine::new(interrupt),
            Room(room),
            output,
        )))
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.0.lock()
    }

    /// Gives input to the guest, and returns how many bytes there was room for.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut uart = self.uart();
        let bytes = &bytes[..bytes.len().min(uart.fifo_capacity())];
        if bytes.is_empty() {
            return 0;
        }
        // In loopback mode the port hears only itself: the input is lost, as on a wire.
        match uart.enqueue_raw_bytes(bytes) {
            Ok(taken @ 1..) => taken,
            _ => bytes.len(),
        }
    }
}

impl IoHandler for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let ([byte], Ok(register)) = (data, u8::try_from(offset)) {
            *byte = self.uart().read(register);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (&[byte], Ok(register)) = (data, u8::try_from(offset))
            && let Err(error) = self.uart().write(register, byte)
        {
            tracing::debug!(?error, "serial port");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const DATA: u64 = 0;
    const LSR: u64 = 5;

    #[derive(Clone, Default)]
    struct Collect(Arc<Mutex<Vec<u8>>>);

    impl Write for Collect {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn bytes_pass_both_ways() {
        let (out, room) = (Collect::default(), EventFd::new(0).unwrap());
        let port = SerialPort::new(
            EventFd::new(0).unwrap(),
            Box::new(out.clone()),
            room.try_clone().unwrap(),
        );
        port.write(DATA, b"x");
        assert_eq!(*out.0.lock(), b"x");
        assert_eq!(port.input(b"ab"), 2);
        let mut byte = [0];
        port.read(LSR, &mut byte);
        assert_eq!(byte[0] & 1, 1);
        port.read(DATA, &mut byte);
        assert_eq!(byte, *b"a");
        port.read(DATA, &mut byte);
        assert_eq!(room.read().unwrap(), 1);
    }

    #[test]
    fn a_full_port_takes_no_more() {
        let port = SerialPort::new(
            EventFd::new(0).unwrap(),
            Box::new(Collect::default()),
            EventFd::new(0).unwrap(),
        );
        let taken = port.input(&[0; 1000]);
        assert!(taken < 1000);
        assert_eq!(port.input(b"more"), 0);
    }
}
