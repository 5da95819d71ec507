//! Files whose names clients give, and the limit on open files.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Opens a file without blocking. A FIFO would block until its other end is opened, and the thread serves others.
pub fn open_at_once(how: &mut OpenOptions, path: &Path) -> io::Result<File> {
    how.custom_flags(libc::O_NONBLOCK).open(path)
}

/// Raises the soft limit on open files to the hard one. The soft limit protects programs that use `select`; blobs of
/// the renderer are files, and a guest has many.
pub fn allow_all() {
    let most = getrlimit(Resource::Nofile).maximum;
    let files = Rlimit {
        current: most,
        maximum: most,
    };
    // If that fails, the limit is reported when it is reached.
    let _ = setrlimit(Resource::Nofile, files);
}
