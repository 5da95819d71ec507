//! What the guest asks the machine for through a device.

use std::sync::Arc;

/// What the guest asks the machine for through a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestRequest {
    /// Soft off (S5).
    PowerOff,
    /// A restart.
    Reset,
    /// The guest's kernel panicked and will not go on.
    Panicked,
    /// The guest's kernel panicked and boots its crash kernel.
    CrashLoaded,
}

/// Takes the guest's requests, on a vCPU thread; must not block.
pub type RequestSink = Arc<dyn Fn(GuestRequest) + Send + Sync>;

#[cfg(test)]
pub(crate) mod test_util {
    use crate::sync::Mutex;

    use super::*;

    /// A sink and what it took.
    pub fn requests() -> (RequestSink, Arc<Mutex<Vec<GuestRequest>>>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = {
            let seen = seen.clone();
            Arc::new(move |request| seen.lock().push(request))
        };
        (sink, seen)
    }
}
