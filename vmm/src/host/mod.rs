//! What the process opens and changes on the host: files, terminals, signals, limits.

pub mod console;
pub mod files;
pub(crate) mod memory_trim;
pub mod signals;
pub mod terminal;
