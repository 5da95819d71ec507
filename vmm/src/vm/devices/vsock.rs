//! The socket device, which the host's vhost-vsock serves.

use std::{fs::File, io};

use fanlight_api::{OrFd, VsockConfig, socket::Descriptors};
use fanlight_devices::virtio::vsock::{HOST_DEVICE, Vsock, VsockError};
use thiserror::Error;

use super::{CLASS_COMMUNICATION_OTHER, Device, Failure, Kind, Life, Opened, Opening};
use crate::vm::{
    fault::{BadDescriptor, Classify, Fault},
    function::Function,
};

/// The socket device; at most one.
pub static KIND: Kind = Kind {
    field: "vsock",
    title: "socket device",
    open,
    hotplug: None,
};

struct Sockets {
    cid: u32,
    /// The host's vhost-vsock device. Each life of the machine takes a duplicate.
    host: File,
}

/// Why there is no socket device.
#[derive(Debug, Error)]
enum SocketsError {
    /// The context id, or the host's device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// The descriptor.
    #[error(transparent)]
    Descriptor(#[from] BadDescriptor),
    /// The host has no descriptor left.
    #[error("cannot duplicate a descriptor")]
    Duplicate(#[from] io::Error),
}

impl Classify for SocketsError {
    fn fault(&self) -> Fault {
        match self {
            Self::Vsock(error) => error.fault(),
            Self::Descriptor(error) => error.fault(),
            Self::Duplicate(_) => Fault::Host,
        }
    }
}

impl Classify for VsockError {
    fn fault(&self) -> Fault {
        match self {
            VsockError::Cid(_) | VsockError::Open { .. } | VsockError::CidInUse(_) => Fault::Input,
            VsockError::Host { .. } => Fault::Host,
        }
    }
}

fn open(opening: &mut Opening) -> Opened {
    let descriptors = opening.descriptors;
    KIND.open_each(
        &opening.config.vsock,
        |_| None,
        |config| Ok(Sockets::open(config, descriptors)?),
    )
}

impl Sockets {
    fn open(config: &VsockConfig, descriptors: &Descriptors) -> Result<Self, SocketsError> {
        let host = match &config.device {
            Some(OrFd::Fd(number)) => descriptors.take(*number).map_err(BadDescriptor)?.into(),
            Some(OrFd::Named(path)) => Vsock::open_host_device(path)?,
            None => Vsock::open_host_device(HOST_DEVICE.as_ref())?,
        };
        Ok(Self {
            cid: config.cid,
            host,
        })
    }

    fn device(&self, life: &Life) -> Result<Vsock, SocketsError> {
        let host = self.host.try_clone()?;
        Ok(Vsock::new(self.cid, host, &life.context.mem)?)
    }
}

impl Device for Sockets {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn id(&self) -> &str {
        "vsock"
    }

    fn build(&self, life: &mut Life) -> Result<Function, Failure> {
        let vsock = self.device(life)?;
        life.virtio(Box::new(vsock), CLASS_COMMUNICATION_OTHER)
    }
}
