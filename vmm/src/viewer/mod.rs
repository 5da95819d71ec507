//! `fanlight view`: a guest's output in a Wayland window. A process of its own, which can be killed at any
//! time: it holds nothing of the guest's but descriptors.

mod buffers;
mod cursor;
mod dispatch;
mod mapping;
mod picture;
mod run;
mod seat;
mod window;

pub use run::{ViewError, run};
