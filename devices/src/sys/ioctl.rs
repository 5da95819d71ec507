//! What every ioctl has in common.

use std::io;

/// The result of an ioctl, with the error number of a failed one.
pub(super) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
