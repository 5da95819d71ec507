//! Many commands for one notification: it costs an exit and, in the nested host, far more time than a command.

use super::{Gpu, OK, PAGE, REQUEST, RESPONSE};
use crate::{Result, ensure};

/// Bytes for each request and response. Both pages take as many as a queue, which has two descriptors for each command.
const REQUEST_ROOM: usize = 64;
const RESPONSE_ROOM: usize = 64;
/// The most commands in a batch.
pub const MOST: usize = PAGE / REQUEST_ROOM;

/// A command of 32-bit words.
pub struct Command {
    pub context: u32,
    pub type_: u32,
    pub body: Vec<u32>,
}

impl Gpu {
    /// Sends at most [`MOST`] commands together, each of which must succeed.
    pub fn batch(&mut self, commands: &[Command]) -> Result<()> {
        ensure(commands.len() <= MOST, "too many commands")?;
        let mut table = Vec::new();
        let mut heads = Vec::new();
        for (number, command) in (0u16..).zip(commands) {
            let head = [command.type_, 0, 0, 0, command.context, 0];
            let words = head.iter().chain(&command.body);
            let request: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
            ensure(request.len() <= REQUEST_ROOM, "the command is too long")?;
            let [from, to] = places(number.into());
            self.pages.write(from, &request);
            // Clears the response of an earlier batch.
            self.pages.write(to, &0u32.to_le_bytes());
            let next = number * 2 + 1;
            table.extend(self.descriptor(from, request.len(), 1, next));
            table.extend(self.descriptor(to, RESPONSE_ROOM, 2, 0));
            heads.push(number * 2);
        }
        self.submit(&table, &heads)?;
        for (number, Command { type_, body, .. }) in commands.iter().enumerate() {
            let [_, to] = places(number);
            let answer: u32 = self.pages.read(to);
            ensure(
                answer & !0xff == OK,
                format!("{type_:#x} of {body:?} is answered by {answer:#x}"),
            )?;
        }
        Ok(())
    }
}

/// Offsets of a command's request and response.
fn places(number: usize) -> [usize; 2] {
    [
        REQUEST + number * REQUEST_ROOM,
        RESPONSE + number * RESPONSE_ROOM,
    ]
}
