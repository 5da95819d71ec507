//! Input from the host to the guest's consoles.

use std::collections::VecDeque;

use crate::{
    host::console::Input,
    vm::{guest_console::GuestConsole, resources::Consoles},
};

/// A console with the source of its input.
pub struct ConsoleInput<'a> {
    /// The source: terminal, socket or nothing.
    pub source: &'a mut Input,
    /// The guest's side.
    pub guest: GuestConsole,
    /// Bytes that the guest had no room for.
    pub pending: VecDeque<u8>,
    /// Whether the main loop waits on the source.
    pub waiting: bool,
}

/// Connects backends with the machine's consoles: the serial port, and the virtio console if there is one.
pub fn inputs(hosts: &mut Consoles, guests: Vec<GuestConsole>) -> Vec<ConsoleInput<'_>> {
    let hosts = [Some(&mut hosts.serial), hosts.virtio.as_mut()];
    let inputs = hosts.into_iter().flatten().zip(guests);
    let inputs = inputs.map(|(host, guest)| ConsoleInput {
        source: &mut host.input,
        guest,
        pending: VecDeque::new(),
        waiting: false,
    });
    let inputs: Vec<_> = inputs.collect();
    inputs.iter().for_each(ConsoleInput::resize);
    inputs
}

impl ConsoleInput<'_> {
    /// Tells the guest the terminal's size, if the host's side is one.
    pub fn resize(&self) {
        if let Some((columns, rows)) = self.source.terminal_size() {
            (self.guest.resize)(columns, rows);
        }
    }

    /// Writes pending bytes to the console. Returns whether all fit.
    pub fn push(&mut self) -> bool {
        while !self.pending.is_empty() {
            let (front, _) = self.pending.as_slices();
            let taken = (self.guest.give)(front);
            if taken == 0 {
                return false;
            }
            self.pending.drain(..taken);
        }
        true
    }
}
