//! Network interfaces: a tap interface of the host, with vhost-net where the host has it.

use std::sync::Arc;

use fanlight_api::{NetConfig, OrFd, VmConfig, socket::Descriptors, types::AddDevice};
use fanlight_devices::virtio::net::{Mac, MacError, Net, Tap, TapError, VhostNetError};
use thiserror::Error;

use super::{Device, Entry, Failure, Hotplug, Kind, Life, Opened, Opening, Place};
use crate::vm::{
    fault::{BadDescriptor, Classify, Fault},
    function::Function,
};

/// Ethernet controller (PCI Code and ID Assignment 1.11).
const CLASS_NETWORK_ETHERNET: u32 = 0x02_0000;

/// Network interfaces, in the configuration's order.
pub static KIND: Kind = Kind {
    field: "net",
    title: "network interface",
    open,
    hotplug: Some(Hotplug::of::<NetConfig>()),
};

/// A network interface of the machine.
struct Interface {
    id: String,
    tap: Arc<Tap>,
    mac: Mac,
    /// Whether vhost-net must or must not be used; used where possible if absent.
    vhost: Option<bool>,
    port: Option<u8>,
}

/// Why an interface cannot be opened.
#[derive(Debug, Error)]
enum OpenError {
    /// The tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The hardware address.
    #[error("mac")]
    Mac(#[from] MacError),
    /// The descriptor.
    #[error(transparent)]
    Descriptor(#[from] BadDescriptor),
}

impl Classify for OpenError {
    fn fault(&self) -> Fault {
        match self {
            Self::Tap(error) => error.fault(),
            Self::Mac(_) => Fault::Input,
            Self::Descriptor(error) => error.fault(),
        }
    }
}

impl Classify for TapError {
    fn fault(&self) -> Fault {
        match self {
            TapError::Name(_)
            | TapError::NoTun { .. }
            | TapError::Permission(_)
            | TapError::Busy(_)
            | TapError::NotATap(_)
            | TapError::NotATapDescriptor(_) => Fault::Input,
            TapError::Host { .. } => Fault::Host,
        }
    }
}

/// Arises only where vhost-net is demanded and the host does not have it.
impl Classify for VhostNetError {
    fn fault(&self) -> Fault {
        Fault::Input
    }
}

fn open(opening: &mut Opening) -> Opened {
    let descriptors = opening.descriptors;
    KIND.open_each(
        &opening.config.net,
        |c| c.id.as_deref(),
        |config| Ok(Interface::open(config, descriptors)?),
    )
}

impl Entry for NetConfig {
    fn of_config(config: &mut VmConfig) -> &mut Vec<Self> {
        &mut config.net
    }

    fn of_request(request: &mut AddDevice) -> &mut Option<Self> {
        &mut request.net
    }

    fn place(&mut self) -> Place<'_> {
        Place {
            id: &mut self.id,
            port: &mut self.port,
        }
    }
}

impl Interface {
    fn open(config: &NetConfig, descriptors: &Descriptors) -> Result<Self, OpenError> {
        let id = config.id.clone().unwrap_or_default();
        let mac = match (&config.mac, &config.tap) {
            (Some(text), _) => text.parse()?,
            (None, OrFd::Named(tap)) => Mac::for_name(tap),
            // Two machines may be given descriptors of one number.
            (None, OrFd::Fd(_)) => Mac::for_name(&format!("{id}@{}", std::process::id())),
        };
        let tap = match &config.tap {
            OrFd::Named(name) => Tap::open(name)?,
            OrFd::Fd(number) => {
                let fd = descriptors.take(*number).map_err(BadDescriptor)?;
                Tap::from_fd(fd, &config.tap.to_string())?
            }
        };
        Ok(Self {
            id,
            tap: Arc::new(tap),
            mac,
            vhost: config.vhost,
            port: config.port,
        })
    }
}

impl Device for Interface {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn port(&self) -> Option<u8> {
        self.port
    }

    fn build(&self, life: &mut Life) -> Result<Function, Failure> {
        let mem = &life.context.mem;
        let net = Net::new(self.tap.clone(), self.mac, self.vhost, mem)?;
        life.virtio(Box::new(net), CLASS_NETWORK_ETHERNET)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_address_or_name_is_bad_input() {
        for spec in ["tap0,mac=nonsense", "no/such name"] {
            let config = spec.parse().unwrap();
            match Interface::open(&config, &Descriptors::Inherited) {
                Err(error) => assert_eq!(error.fault(), Fault::Input, "{error}"),
                Ok(_) => panic!("{spec} is accepted"),
            }
        }
    }
}
