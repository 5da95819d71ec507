//! Network device (Virtio 1.3, 5.1) on a tap interface. The host kernel's vhost-net moves the frames if it is
//! available; otherwise two threads of this process do.

mod device;
mod mac;
mod tap;
mod user;

pub use device::{Net, VhostNetError};
pub use mac::{Mac, MacError};
pub use tap::{Tap, TapError};
