//! Responses to the driver.

use zerocopy::{Immutable, IntoBytes};

use super::{error::CommandError, protocol::VIRTIO_GPU_RESP_OK_NODATA, subscriber::FlushFence};

/// A response to the driver, without its header.
#[derive(Debug)]
pub struct Response {
    /// Type of the response.
    pub type_: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// The subscribers that must release the flush before a fenced response is sent.
    pub fence: Option<FlushFence>,
}

impl Response {
    pub const OK: Self = Self {
        type_: VIRTIO_GPU_RESP_OK_NODATA,
        body: Vec::new(),
        fence: None,
    };

    pub fn with(type_: u32, body: &(impl IntoBytes + Immutable)) -> Self {
        Self {
            type_,
            body: body.as_bytes().into(),
            fence: None,
        }
    }
}

impl From<&CommandError> for Response {
    fn from(error: &CommandError) -> Self {
        Self {
            type_: error.response(),
            ..Self::OK
        }
    }
}
