//! Many commands for one notification, which costs an exit and, in the nested host, far more than a command.

use super::{Gpu, OK, PAGE, REQUEST, RESPONSE};
use crate::{Result, ensure};

/// Room of a request and of a response: as many of either as a queue takes, which has two descriptors for each.
const REQUEST_ROOM: usize = 64;
const RESPONSE_ROOM: usize = 64;
/// The most commands of a batch.
pub const MOST: usize = PAGE / REQUEST_ROOM;

/// A command of 32-bit words.
pub struct Command {
    pub context: u32,
    pub type_: u32,
    pub body: Vec<u32>,
}

impl Gpu {
    /// Sends at most [`MOST`] commands together, each of which must be done.
    pub fn batch(&mut self, commands: &[Command]) -> Result<()> {
        ensure(commands.len() <= MOST, "too many commands")?;
        let mut table = Vec::new();
        let mut heads = Vec::new();
        for (number, command) in (0u16..).zip(commands) {
            let head = [command.type_, 0, 0, 0, command.context, 0];
            let words = head.iter().chain(&command.body);
            let request: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
            ensure(request.len() <= REQUEST_ROOM, "a command too long")?;
            let [from, to] = places(number.into());
            self.pages.write(from, &request);
            // An answer of an earlier batch is none.
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

/// Where a command's request and response are.
fn places(number: usize) -> [usize; 2] {
    [
        REQUEST + number * REQUEST_ROOM,
        RESPONSE + number * RESPONSE_ROOM,
    ]
}
