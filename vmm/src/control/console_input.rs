//! What the host types, on its way into the guest's consoles.

use std::collections::VecDeque;

use vmm_sys_util::eventfd::EventFd;

use crate::{host::console::Input, host::resources::Consoles, vm::machine::Machine};

/// Gives bytes to a console; how many found room.
type Give = Box<dyn Fn(&[u8]) -> usize>;

/// A console of the machine with the host's side of its input.
pub struct ConsoleInput<'a> {
    /// The host's side.
    pub source: &'a mut Input,
    give: Give,
    /// Signalled when the guest has made room.
    pub room: EventFd,
    /// What the guest had no room for.
    pub pending: VecDeque<u8>,
    /// Whether the source is being waited on.
    pub waiting: bool,
}

/// The machine's consoles, those of `consoles` that it has.
pub fn inputs<'a>(consoles: Consoles<'a>, machine: &Machine) -> Vec<ConsoleInput<'a>> {
    let serial = machine.serial.clone();
    let mut inputs: Vec<(_, Give, _)> = vec![(
        &mut consoles.serial.input,
        Box::new(move |bytes: &[u8]| serial.input(bytes)),
        &machine.serial_room,
    )];
    if let (Some(host), Some((handle, room))) = (consoles.console, &machine.console) {
        let handle = handle.clone();
        if let Some((cols, rows)) = host.input.terminal_size() {
            handle.resize(cols, rows);
        }
        inputs.push((
            &mut host.input,
            Box::new(move |bytes: &[u8]| handle.input(bytes)),
            room,
        ));
    }
    inputs
        .into_iter()
        .filter_map(|(source, give, room)| {
            Some(ConsoleInput {
                source,
                give,
                room: room.try_clone().ok()?,
                pending: VecDeque::new(),
                waiting: false,
            })
        })
        .collect()
}

impl ConsoleInput<'_> {
    /// Gives the guest what waits; returns whether everything found room.
    pub fn push(&mut self) -> bool {
        while !self.pending.is_empty() {
            let (front, _) = self.pending.as_slices();
            let taken = (self.give)(front);
            if taken == 0 {
                return false;
            }
            self.pending.drain(..taken);
        }
        true
    }
}
