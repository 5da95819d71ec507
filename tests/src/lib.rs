//! Building blocks of the end-to-end tests, the benchmarks and the demo.
//!
//! [`guest_side`] runs inside guests, in the program `guest-agent`. [`host_side`] starts Fanlight, talks to it and
//! judges what it sees. [`common`] is for both. Neither side imports the other. [`mutations`] tests the tests.

pub mod common;
pub mod guest_side;
pub mod host_side;
pub mod mutations;
pub mod nested_host;
pub mod progress;

/// Any failure of this package, as one line for a person.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Failure(pub String);

/// Result with a [`Failure`].
pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// `what` could not be done because of `cause`.
    pub fn new(what: impl std::fmt::Display, cause: impl std::fmt::Display) -> Self {
        Self(format!("{what}: {cause}"))
    }
}

/// Adds what was being done to an error.
pub trait Context<T> {
    /// The failure says that `what` could not be done.
    fn context(self, what: impl std::fmt::Display) -> Result<T>;
}

impl<T, E: std::fmt::Display> Context<T> for Result<T, E> {
    fn context(self, what: impl std::fmt::Display) -> Result<T> {
        self.map_err(|error| Failure::new(what, error))
    }
}

/// Starts the message about a guest or a server that was silent for too long.
pub const HANG: &str = "it hangs";

/// The line of `text` that starts with `prefix`, without it.
pub fn value<'a>(text: &'a str, prefix: &str) -> Result<&'a str> {
    text.lines()
        .find_map(|line| line.trim().strip_prefix(prefix))
        .map(str::trim)
        .ok_or_else(|| Failure(format!("no line starts with {prefix:?} in:\n{text}")))
}

/// Fails with the given text unless `condition` holds.
pub fn ensure(condition: bool, otherwise: impl std::fmt::Display) -> Result<()> {
    if condition {
        Ok(())
    } else {
        Err(Failure(otherwise.to_string()))
    }
}
