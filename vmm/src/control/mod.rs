//! The control API: calls come in on the server's thread (`queue`), and the thread that owns the machine answers
//! them (`serve` while there is none).

pub mod queue;
pub mod serve;
