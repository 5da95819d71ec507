//! What end-to-end tests, benchmarks and the demo are built of: the nested host (a KVM host that Fanlight brings
//! along), guests, and the host they run on.

mod activity;
pub mod bench;
mod description;
pub mod display;
pub mod drm;
pub mod echo;
pub mod edu;
pub mod evdev;
pub mod graphics;
pub mod guest;
pub mod host;
pub mod nested_host;
pub mod noiommu;
pub mod painting;
pub mod pci;
pub mod progress;
pub mod raw_gpu;
pub mod reader;
pub mod rogue;
pub mod screen;
pub mod tryout;
pub mod watcher;

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
