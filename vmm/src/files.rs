//! Files of the host's, opened by names that clients give.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// Opens without waiting, which for a FIFO would be until somebody opens its other end: the thread that
/// opens has others to serve.
pub fn open_at_once(how: &mut OpenOptions, path: &Path) -> io::Result<File> {
    how.custom_flags(libc::O_NONBLOCK).open(path)
}
