//! Displays of the machine as the API offers them: frames and outputs (`api`), streams of updates (`stream`), and
//! the input that a viewer sends back (`input`).

pub mod api;
pub mod input;
mod messages;
mod png;
mod stream;
