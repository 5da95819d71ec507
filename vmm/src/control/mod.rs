//! The control API: calls come in on the server's thread (`queue`), and the thread that owns the machine answers
//! them (`serve` while there is none).

mod console_input;
mod handlers;
mod panic_grace;
pub mod queue;
pub mod run_loop;
pub mod serve;
