//! What a guest shows and what is typed into it, as the API offers it.

pub mod api;
pub mod input;
mod png;
mod stream;
