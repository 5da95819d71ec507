//! Passed-through devices: PCI functions of the host, and the IOMMU context for their DMA. Both are kept over resets.

use std::{fs::File, io, path::PathBuf, sync::Arc};

use fanlight_api::{
    Iommufd, OrFd, PathOrFd, VfioConfig, VmConfig, socket::Descriptors, types::AddDevice,
};
use fanlight_devices::vfio::{
    HostDevice, Iommu, VfioError, VfioFunction,
    sysfs::{HostFunction, PciAddress, PciAddressError},
};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::{Device, Devices, Entry, Failure, Hotplug, Kind, Life, Opened, Opening, Place};
use crate::vm::{
    fault::{BadDescriptor, Classify, Fault},
    function::Function,
};

/// Passed-through devices, in the configuration's order.
pub static KIND: Kind = Kind {
    field: "vfio",
    title: "passed-through device",
    open,
    hotplug: Some(Hotplug::of::<VfioConfig>()),
};

/// Why devices cannot be passed through.
#[derive(Debug, Error)]
enum PassthroughError {
    /// Not an address.
    #[error(transparent)]
    Address(#[from] PciAddressError),
    /// One device twice.
    #[error("{0}: given twice")]
    Twice(PciAddress),
    /// The machine has the device already.
    #[error("{0}: the machine has it already")]
    Present(PciAddress),
    /// Both interfaces at once.
    #[error(
        "iommufd=on for one device and iommufd=off for another: a machine uses one of them for all, so \
         that its devices can reach each other"
    )]
    BothInterfaces,
    /// An open device node can be used with iommufd only.
    #[error(
        "iommufd=off or a group for a device whose open node is given: such nodes are for iommufd; name the \
         device's address instead"
    )]
    NodeInContainer,
    /// A descriptor of something else.
    #[error("{0}: not a device's node in /dev/vfio/devices")]
    NotANode(String),
    /// A descriptor is missing.
    #[error(transparent)]
    Descriptor(#[from] BadDescriptor),
    /// A second IOMMU node.
    #[error("iommu: a machine has one for all its devices, and it is there already: leave it away")]
    SecondIommu,
    /// The node of iommufd, of the container or of a group.
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

impl Classify for PassthroughError {
    fn fault(&self) -> Fault {
        match self {
            Self::Address(_)
            | Self::Twice(_)
            | Self::Present(_)
            | Self::BothInterfaces
            | Self::NodeInContainer
            | Self::SecondIommu
            | Self::OpenNode { .. } => Fault::Input,
            Self::NotANode(_) => Fault::Descriptor,
            Self::Descriptor(error) => error.fault(),
            Self::Vfio(error) => error.fault(),
        }
    }
}

impl Classify for VfioError {
    fn fault(&self) -> Fault {
        match self {
            VfioError::NoDevice(_)
            | VfioError::NotBound { .. }
            | VfioError::NoIommu(_)
            | VfioError::NotViable { .. }
            | VfioError::Busy(_)
            | VfioError::Permission(_)
            | VfioError::NoNode { .. }
            | VfioError::UnsafeInterrupts
            | VfioError::MemoryLock { .. }
            | VfioError::OutOfReach { .. } => Fault::Input,
            VfioError::NotAContainer
            | VfioError::NotAGroup(_)
            | VfioError::NotInGroup(_)
            | VfioError::GroupInContainer(_) => Fault::Descriptor,
            VfioError::Broken { .. }
            | VfioError::Msix(_)
            | VfioError::DmaBuf(_)
            | VfioError::Library { .. }
            | VfioError::Device { .. }
            | VfioError::Host { .. } => Fault::Host,
        }
    }
}

/// A PCI function of the host in the guest.
struct PassedThrough {
    id: String,
    device: Arc<HostDevice>,
    /// Shared by all passed-through devices of the machine.
    iommu: Arc<Iommu>,
    port: Option<u8>,
}

fn open(opening: &mut Opening) -> Opened {
    let configs = &opening.config.vfio;
    if configs.is_empty() {
        return Ok(Vec::new());
    }
    let (found, iommu) = find(configs, opening.present, opening.descriptors)
        .map_err(|error| KIND.error(None, error))?;
    let found: Vec<_> = configs.iter().zip(found).collect();
    KIND.open_each(
        found,
        |(c, _)| c.id.as_deref(),
        |(config, found)| Ok(found.open(config, iommu.clone())?),
    )
}

/// Finds what `configs` name, and opens the I/O address space for them unless there is one.
fn find(
    configs: &[VfioConfig],
    present: &Devices,
    descriptors: &Descriptors,
) -> Result<(Vec<Found>, Arc<Iommu>), PassthroughError> {
    let mut found: Vec<Found> = Vec::new();
    for config in configs {
        let next = Found::new(config, descriptors)?;
        let address = next.function.address;
        if found.iter().any(|other| other.function.address == address) {
            return Err(PassthroughError::Twice(address));
        }
        let mut passed = present.of::<PassedThrough>();
        if passed.any(|passed| passed.device.address == address) {
            return Err(PassthroughError::Present(address));
        }
        found.push(next);
    }
    if let Some(iommu) = present.iommu() {
        let with_iommufd = matches!(**iommu, Iommu::Iommufd(_));
        if interface(configs)?.is_some_and(|wish| wish != with_iommufd) {
            return Err(PassthroughError::BothInterfaces);
        }
        if configs.iter().any(|config| config.iommu.is_some()) {
            return Err(PassthroughError::SecondIommu);
        }
        return Ok((found, iommu.clone()));
    }
    for found in &found {
        found.function.check_usable()?;
    }
    let functions: Vec<_> = found.iter().map(|found| found.function.clone()).collect();
    let node = iommu_node(configs, descriptors)?;
    let iommu = Iommu::open(&functions, interface(configs)?, node)?;
    Ok((found, iommu))
}

impl Entry for VfioConfig {
    fn of_config(config: &mut VmConfig) -> &mut Vec<Self> {
        &mut config.vfio
    }

    fn of_request(request: &mut AddDevice) -> &mut Option<Self> {
        &mut request.vfio
    }

    fn place(&mut self) -> Place<'_> {
        Place {
            id: &mut self.id,
            port: &mut self.port,
        }
    }
}

impl Device for PassedThrough {
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
        let number = *life.next_function;
        *life.next_function = number.wrapping_add(1);
        let function = VfioFunction::new(self.device.clone(), number, life.context)?;
        Ok(Function::PassedThrough(function))
    }

    fn shares_memory(&self) -> bool {
        true
    }

    fn iommu(&self) -> Option<&Arc<Iommu>> {
        Some(&self.iommu)
    }

    fn host_request(&self) -> Option<&EventFd> {
        Some(self.device.request())
    }
}

/// The function that a configuration names.
struct Found {
    function: HostFunction,
    /// Its node in `/dev/vfio/devices` or the node of its group, if the configuration has an open one.
    node: Option<File>,
}

impl Found {
    fn new(config: &VfioConfig, descriptors: &Descriptors) -> Result<Self, PassthroughError> {
        let node = descriptors.take_of(&config.device).map_err(BadDescriptor)?;
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

    fn open(self, config: &VfioConfig, iommu: Arc<Iommu>) -> Result<PassedThrough, VfioError> {
        let id = config.id.clone().unwrap_or_default();
        let address = self.function.address;
        let device = HostDevice::open(&self.function, iommu.clone(), self.node)?;
        tracing::info!(%address, %id, iommu = iommu.name(), "passed through");
        Ok(PassedThrough {
            id,
            device: Arc::new(device),
            iommu,
            port: config.port,
        })
    }
}

/// Closes an inherited descriptor after it was duplicated: the host gets a device or group back when the last
/// descriptor is closed.
fn close_inherited(number: u32) {
    if let Ok(number) = i32::try_from(number) {
        // SAFETY: a node that was open when the process started, so no value in this process owns it.
        unsafe { rustix::io::close(number) };
    }
}

/// The node of iommufd or of the container, if one of the devices names it. All devices share it.
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

/// A VFIO node: the open one, or the one at the path.
fn open_node(node: &PathOrFd, descriptors: &Descriptors) -> Result<File, PassthroughError> {
    let open = descriptors.take_of(node).map_err(BadDescriptor)?;
    if let Some(open) = open {
        return Ok(open.into());
    }
    let path = PathBuf::from(node.to_string());
    let file = File::options().read(true).write(true).open(&path);
    file.map_err(|source| PassthroughError::OpenNode { path, source })
}

/// Whether the devices are to use iommufd or VFIO's container, if the configuration says.
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

    fn find_error(spec: &str) -> PassthroughError {
        let configs = [spec.parse().unwrap()];
        match find(&configs, &Devices::default(), &Descriptors::Inherited) {
            Ok(_) => panic!("{spec} is there"),
            Err(error) => error,
        }
    }

    #[test]
    fn mistakes_are_named() {
        let error = find_error("gpu");
        assert_eq!(error.fault(), Fault::Input);
        assert!(error.to_string().contains("fanlight vfio list"), "{error}");
        let file = tempfile::tempfile().unwrap();
        let spec = format!("fd:{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let error = find_error(&spec);
        assert_eq!(error.fault(), Fault::Descriptor);
        assert!(error.to_string().contains("/dev/vfio/devices"), "{error}");
        let error = find_error("ffff:ff:1f.7");
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
