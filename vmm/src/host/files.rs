//! Files of the host's: how those are opened whose names clients give, and how many there may be.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Opens without waiting, which for a FIFO would be until somebody opens its other end: the thread that
/// opens has others to serve.
pub fn open_at_once(how: &mut OpenOptions, path: &Path) -> io::Result<File> {
    how.custom_flags(libc::O_NONBLOCK).open(path)
}

/// Lets this process open as many files as it may have: the limit below that is for programs that use `select`. Blobs of
/// the renderer's are files, of which there are many.
pub fn allow_all() {
    let most = getrlimit(Resource::Nofile).maximum;
    let files = Rlimit {
        current: most,
        maximum: most,
    };
    // What is not to be had is told when it is needed.
    let _ = setrlimit(Resource::Nofile, files);
}
