//! Passed-through devices of a machine: opened once, kept over resets.

use std::sync::Arc;

use fanlight_api::{Iommufd, VfioConfig};
use fanlight_devices::vfio::{
    HostDevice, Iommu, VfioError,
    sysfs::{HostFunction, PciAddress, PciAddressError},
};
use thiserror::Error;

/// Why devices cannot be passed through.
#[derive(Debug, Error)]
pub enum PassthroughError {
    /// Not an address.
    #[error(transparent)]
    Address(#[from] PciAddressError),
    /// One device twice.
    #[error("{0}: given twice")]
    Twice(PciAddress),
    /// There already.
    #[error("{0}: the machine has it already")]
    Present(PciAddress),
    /// Both interfaces at once.
    #[error(
        "iommufd=on for one device and iommufd=off for another: a machine uses one of them for all, so \
         that its devices can reach each other"
    )]
    BothInterfaces,
    /// The device or the IOMMU.
    #[error(transparent)]
    Vfio(#[from] VfioError),
}

/// A device with its place in the machine.
#[derive(Debug)]
pub struct PassedThrough {
    /// The device.
    pub device: Arc<HostDevice>,
    /// What it is called.
    pub id: String,
    /// Root port, if it is behind one.
    pub port: Option<u8>,
}

/// The machine's devices with what bounds their DMA.
#[derive(Debug)]
pub struct Passthrough {
    /// In the guest's order.
    pub devices: Vec<PassedThrough>,
    /// Their I/O address space.
    pub iommu: Arc<Iommu>,
}

impl Passthrough {
    /// Opens what `configs` name, each of which has a name of its own; nothing if they are none.
    pub fn open(configs: &[VfioConfig]) -> Result<Option<Self>, PassthroughError> {
        if configs.is_empty() {
            return Ok(None);
        }
        let mut functions: Vec<HostFunction> = Vec::new();
        for config in configs {
            let address: PciAddress = config.device.parse()?;
            if functions.iter().any(|other| other.address == address) {
                return Err(PassthroughError::Twice(address));
            }
            functions.push(HostFunction::find(address).ok_or(VfioError::NoDevice(address))?);
        }
        for function in &functions {
            function.check_usable()?;
        }
        let iommu = Iommu::open(&functions, interface(configs)?)?;
        let devices = functions
            .iter()
            .zip(configs)
            .map(|(function, config)| open(function, config, &iommu))
            .collect::<Result<_, VfioError>>()?;
        Ok(Some(Self { devices, iommu }))
    }

    /// Opens one more device for a machine that runs.
    pub fn add(this: &mut Option<Self>, config: &VfioConfig) -> Result<(), PassthroughError> {
        let address: PciAddress = config.device.parse()?;
        let Some(present) = this else {
            *this = Self::open(std::slice::from_ref(config))?;
            return Ok(());
        };
        if present
            .devices
            .iter()
            .any(|passed| passed.device.address == address)
        {
            return Err(PassthroughError::Present(address));
        }
        let with_iommufd = matches!(*present.iommu, Iommu::Iommufd(_));
        if interface(std::slice::from_ref(config))?.is_some_and(|wish| wish != with_iommufd) {
            return Err(PassthroughError::BothInterfaces);
        }
        let function = HostFunction::find(address).ok_or(VfioError::NoDevice(address))?;
        let device = open(&function, config, &present.iommu)?;
        present.devices.push(device);
        Ok(())
    }

    /// The device of this name.
    pub fn find(&self, id: &str) -> Option<&PassedThrough> {
        self.devices.iter().find(|passed| passed.id == id)
    }
}

fn open(
    function: &HostFunction,
    config: &VfioConfig,
    iommu: &Arc<Iommu>,
) -> Result<PassedThrough, VfioError> {
    let id = config.id.clone().unwrap_or_default();
    let device = HostDevice::open(function, iommu.clone())?;
    tracing::info!(address = %function.address, %id, iommu = iommu.name(), "passed through");
    Ok(PassedThrough {
        device: Arc::new(device),
        id,
        port: config.port,
    })
}

/// Which interface the devices are to use, if somebody cares.
fn interface(configs: &[VfioConfig]) -> Result<Option<bool>, PassthroughError> {
    let wants = |wish| configs.iter().any(|config| config.iommufd == wish);
    match (wants(Iommufd::On), wants(Iommufd::Off)) {
        (true, true) => Err(PassthroughError::BothInterfaces),
        (true, false) => Ok(Some(true)),
        (false, true) => Ok(Some(false)),
        (false, false) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(specs: &[&str]) -> Result<Option<Passthrough>, PassthroughError> {
        let configs: Vec<_> = specs.iter().map(|spec| spec.parse().unwrap()).collect();
        Passthrough::open(&configs)
    }

    #[test]
    fn mistakes_are_named() {
        assert!(open(&[]).unwrap().is_none());
        let error = open(&["gpu"]).unwrap_err();
        assert!(error.to_string().contains("fanlight vfio list"), "{error}");
        let error = open(&["ffff:ff:1f.7"]).unwrap_err();
        assert!(error.to_string().contains("no such PCI device"), "{error}");
    }

    #[test]
    fn one_interface_serves_all() {
        let choose = |specs: &[&str]| {
            let configs: Vec<_> = specs.iter().map(|spec| spec.parse().unwrap()).collect();
            interface(&configs)
        };
        assert_eq!(choose(&["1:0.0"]).unwrap(), None);
        assert_eq!(
            choose(&["1:0.0", "1:0.1,iommufd=off"]).unwrap(),
            Some(false)
        );
        assert_eq!(choose(&["1:0.0,iommufd=on"]).unwrap(), Some(true));
        let both = choose(&["1:0.0,iommufd=on", "1:0.1,iommufd=off"]);
        assert!(matches!(both, Err(PassthroughError::BothInterfaces)));
    }
}
