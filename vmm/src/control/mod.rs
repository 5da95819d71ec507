//! The control API of a machine, and the loop that runs it.
//!
//! Calls come in on the server's thread (`requests`). Those that need the machine wait in a queue (`queue`) for the
//! main thread. It answers them in `handlers` and `hotplug` while a machine runs, otherwise in `serve`. Every mapping
//! of an internal error to an API error is in `errors`.

mod console_input;
mod errors;
mod handlers;
mod hotplug;
mod panic_grace;
pub mod queue;
pub mod requests;
pub mod run_loop;
mod running;
pub mod serve;
mod status;
