//! The machine's displays for the API: frames and outputs (`api`), streams of updates (`stream`), and input from
//! viewers (`input`).

pub mod api;
pub mod input;
mod messages;
mod png;
mod stream;
