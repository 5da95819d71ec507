//! Passed-through devices of a machine: opened once, kept over resets.

use std::{fs::File, io, path::PathBuf, sync::Arc};

use fanlight_api::{ApiError, Iommufd, OrFd, PathOrFd, VfioConfig, socket::Descriptors};
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
    /// A descriptor goes with iommufd only.
    #[error(
        "iommufd=off or a group for a device whose open node is given: those are iommufd's; name its address \
         instead"
    )]
    NodeInContainer,
    /// A descriptor of something else.
    #[error("{0}: not a device's node in /dev/vfio/devices")]
    NotANode(String),
    /// A descriptor is missing.
    #[error(transparent)]
    Descriptor(ApiError),
    /// Two of them.
    #[error("iommu: a machine has one for all its devices, and it is there already: leave it away")]
    SecondIommu,
    /// iommufd's node, the container's, or a group's.
    #[error("{}: cannot open it", path.display())]
    OpenNode {
        /// The node.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
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
    /// Opens what `configs` name, each of which has a name of its own; nothing if they are none. Descriptors that they
    /// name come from `descriptors`.
    pub fn open(
        configs: &[VfioConfig],
        descriptors: &Descriptors,
    ) -> Result<Option<Self>, PassthroughError> {
        if configs.is_empty() {
            return Ok(None);
        }
        let mut found: Vec<Found> = Vec::new();
        for config in configs {
            let next = Found::new(config, descriptors)?;
            let address = next.function.address;
            if found.iter().any(|other| other.function.address == address) {
                return Err(PassthroughError::Twice(address));
            }
            found.push(next);
        }
        for found in &found {
            found.function.check_usable()?;
        }
        let functions: Vec<_> = found.iter().map(|found| found.function.clone()).collect();
        let iommu = Iommu::open(
            &functions,
            interface(configs)?,
            iommu_node(configs, descriptors)?,
        )?;
        let devices = found
            .into_iter()
            .zip(configs)
            .map(|(found, config)| found.open(config, &iommu))
            .collect::<Result<_, VfioError>>()?;
        Ok(Some(Self { devices, iommu }))
    }

    /// Opens one more device for a machine that runs.
    pub fn add(
        this: &mut Option<Self>,
        config: &VfioConfig,
        descriptors: &Descriptors,
    ) -> Result<(), PassthroughError> {
        let Some(present) = this else {
            *this = Self::open(std::slice::from_ref(config), descriptors)?;
            return Ok(());
        };
        let found = Found::new(config, descriptors)?;
        let address = found.function.address;
        let is_it = |passed: &PassedThrough| passed.device.address == address;
        if present.devices.iter().any(is_it) {
            return Err(PassthroughError::Present(address));
        }
        let with_iommufd = matches!(*present.iommu, Iommu::Iommufd(_));
        if interface(std::slice::from_ref(config))?.is_some_and(|wish| wish != with_iommufd) {
            return Err(PassthroughError::BothInterfaces);
        }
        if config.iommu.is_some() {
            return Err(PassthroughError::SecondIommu);
        }
        present.devices.push(found.open(config, &present.iommu)?);
        Ok(())
    }

    /// The device of this name.
    pub fn find(&self, id: &str) -> Option<&PassedThrough> {
        self.devices.iter().find(|passed| passed.id == id)
    }
}

/// What a configuration names.
struct Found {
    function: HostFunction,
    /// Its node in `/dev/vfio/devices` or its group's, if that came open.
    node: Option<File>,
}

impl Found {
    fn new(config: &VfioConfig, descriptors: &Descriptors) -> Result<Self, PassthroughError> {
        let node = descriptors
            .take_of(&config.device)
            .map_err(PassthroughError::Descriptor)?;
        let (function, node) = match (&config.device, node) {
            (OrFd::Named(text), _) => {
                let address: PciAddress = text.parse()?;
                let function = HostFunction::find(address);
                let function = function.ok_or(VfioError::NoDevice(address))?;
                let group = config.group.as_ref();
                let node = group.map(|group| open_node(group, descriptors));
                let node = node.transpose()?;
                if let (Some(OrFd::Fd(number)), Descriptors::Inherited) = (group, descriptors) {
                    close_inherited(*number);
                }
                (function, node)
            }
            (what, node) => {
                if config.group.is_some() {
                    return Err(PassthroughError::NodeInContainer);
                }
                let node = node.map(File::from);
                let function = node.as_ref().and_then(HostFunction::of_node);
                let no_node = || PassthroughError::NotANode(what.to_string());
                let function = function.ok_or_else(no_node)?;
                if let (OrFd::Fd(number), Descriptors::Inherited) = (what, descriptors) {
                    close_inherited(*number);
                }
                (function, node)
            }
        };
        Ok(Self { function, node })
    }

    fn open(self, config: &VfioConfig, iommu: &Arc<Iommu>) -> Result<PassedThrough, VfioError> {
        let id = config.id.clone().unwrap_or_default();
        let address = self.function.address;
        let device = HostDevice::open(&self.function, iommu.clone(), self.node)?;
        tracing::info!(%address, %id, iommu = iommu.name(), "passed through");
        Ok(PassedThrough {
            device: Arc::new(device),
            id,
            port: config.port,
        })
    }
}

/// Closes the descriptor that the process was started with, of which there is another now: the host gets a device or
/// a group back when the last one goes.
fn close_inherited(number: u32) {
    if let Ok(number) = i32::try_from(number) {
        // SAFETY: a node that was open when the process started, so it is nobody's in here.
        unsafe { rustix::io::close(number) };
    }
}

/// iommufd's node or the container's, where one of the devices says which. All have one.
fn iommu_node(
    configs: &[VfioConfig],
    descriptors: &Descriptors,
) -> Result<Option<File>, PassthroughError> {
    let mut named = configs.iter().filter_map(|config| config.iommu.as_ref());
    let node = named.next();
    if named.next().is_some() {
        return Err(PassthroughError::SecondIommu);
    }
    node.map(|node| open_node(node, descriptors)).transpose()
}

/// A node of VFIO's, opened by its path or before.
fn open_node(node: &PathOrFd, descriptors: &Descriptors) -> Result<File, PassthroughError> {
    let open = descriptors
        .take_of(node)
        .map_err(PassthroughError::Descriptor)?;
    if let Some(open) = open {
        return Ok(open.into());
    }
    let path = PathBuf::from(node.to_string());
    let file = File::options().read(true).write(true).open(&path);
    file.map_err(|source| PassthroughError::OpenNode { path, source })
}

/// Which interface the devices are to use, if somebody cares.
fn interface(configs: &[VfioConfig]) -> Result<Option<bool>, PassthroughError> {
    let wants = |wish| configs.iter().any(|config| config.iommufd == wish);
    let is_node = |config: &VfioConfig| matches!(config.device, OrFd::Fd(_));
    let has_node = configs.iter().any(is_node);
    let in_container = wants(Iommufd::Off) || configs.iter().any(|config| config.group.is_some());
    if has_node && in_container {
        return Err(PassthroughError::NodeInContainer);
    }
    match (has_node || wants(Iommufd::On), in_container) {
        (true, true) => Err(PassthroughError::BothInterfaces),
        (true, false) => Ok(Some(true)),
        (false, true) => Ok(Some(false)),
        (false, false) => {
            let has_iommu = configs.iter().any(|config| config.iommu.is_some());
            Ok(has_iommu.then_some(true))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(specs: &[&str]) -> Result<Option<Passthrough>, PassthroughError> {
        let configs: Vec<_> = specs.iter().map(|spec| spec.parse().unwrap()).collect();
        Passthrough::open(&configs, &Descriptors::Inherited)
    }

    #[test]
    fn mistakes_are_named() {
        assert!(open(&[]).unwrap().is_none());
        let error = open(&["gpu"]).unwrap_err();
        assert!(error.to_string().contains("fanlight vfio list"), "{error}");
        let file = tempfile::tempfile().unwrap();
        let spec = format!("fd:{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let error = open(&[&spec]).unwrap_err();
        assert!(error.to_string().contains("/dev/vfio/devices"), "{error}");
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
        assert_eq!(choose(&["fd:5"]).unwrap(), Some(true));
        assert_eq!(choose(&["1:0.0,iommu=/dev/iommu"]).unwrap(), Some(true));
        let error = choose(&["fd:5,iommufd=off"]).unwrap_err();
        assert!(matches!(error, PassthroughError::NodeInContainer));
        assert_eq!(
            choose(&["1:0.0,group=fd:5,iommu=fd:6"]).unwrap(),
            Some(false)
        );
        let both = choose(&["1:0.0,group=fd:5,iommufd=on"]);
        assert!(matches!(both, Err(PassthroughError::BothInterfaces)));
    }
}
