//! The first serial port: a 16550A of vm-superio between the guest's port accesses and an
//! [`Output`](super::output::Output).

use std::{io::Write, sync::MutexGuard};

use vm_superio::{Serial, serial::SerialEvents};
use vmm_sys_util::eventfd::EventFd;

use super::interrupt_line::InterruptLine;
use crate::{memory::IoHandler, sync::Mutex};

/// How many ports the device answers.
pub const PORTS: u64 = 8;

/// Interrupt Enable Register, and its bit for received data (PC16550D data sheet, 8.7).
const IER: u8 = 1;
const IER_RECEIVED_DATA: u8 = 1 << 0;
/// Interrupt Identification Register (8.6): no interrupt is pending, or received data is available.
const IIR: u8 = 2;
const IIR_NONE: u8 = 1 << 0;
const IIR_RECEIVED_DATA: u8 = 0b100;
/// Line Control Register: while this bit is set, IER's place has the divisor.
const LCR: u8 = 3;
const LCR_DIVISOR_LATCH: u8 = 1 << 7;
/// Line Status Register: the receive FIFO has data.
const LSR: u8 = 5;
const LSR_DATA_READY: u8 = 1 << 0;

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

    /// Reads the IIR. vm-superio forgets received data when the guest has read one byte of it. Linux reads at most 256
    /// bytes at a time, then asks again: told of no interrupt, it left the rest, for which none would come.
    fn read_iir(uart: &mut Uart) -> u8 {
        let pending = uart.read(IIR);
        let is_waiting = uart.read(LSR) & LSR_DATA_READY != 0
            && uart.read(LCR) & LCR_DIVISOR_LATCH == 0
            && uart.read(IER) & IER_RECEIVED_DATA != 0;
        if pending & IIR_NONE != 0 && is_waiting {
            return pending & !IIR_NONE | IIR_RECEIVED_DATA;
        }
        pending
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
            let mut uart = self.uart();
            *byte = match register {
                IIR => Self::read_iir(&mut uart),
                _ => uart.read(register),
            };
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
        port.read(LSR.into(), &mut byte);
        assert_eq!(byte[0] & LSR_DATA_READY, LSR_DATA_READY);
        port.read(DATA, &mut byte);
        assert_eq!(byte, *b"a");
        port.read(DATA, &mut byte);
        assert_eq!(room.read().unwrap(), 1);
    }

    #[test]
    fn received_data_is_pending_until_all_of_it_is_read() {
        let port = SerialPort::new(
            EventFd::new(0).unwrap(),
            Box::new(Collect::default()),
            EventFd::new(0).unwrap(),
        );
        let read = |register: u8| {
            let mut byte = [0];
            port.read(register.into(), &mut byte);
            byte[0]
        };
        let pending = || read(IIR) & (IIR_NONE | IIR_RECEIVED_DATA);
        port.write(IER.into(), &[IER_RECEIVED_DATA]);
        port.input(b"ab");
        assert_eq!(pending(), IIR_RECEIVED_DATA);
        assert_eq!(read(DATA as u8), b'a');
        assert_eq!(pending(), IIR_RECEIVED_DATA);
        assert_eq!(read(DATA as u8), b'b');
        assert_eq!(pending(), IIR_NONE);
        // Nobody asked to be told.
        port.write(IER.into(), &[0]);
        port.input(b"c");
        assert_eq!(pending(), IIR_NONE);
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
