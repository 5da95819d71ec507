//! Adds and removes devices while the machine runs, and keeps the configuration up to date.

use fanlight_api::{
    VmConfig,
    socket::Descriptors,
    types::{AddDevice, Added},
};
use fanlight_devices::memory::GuestRam;
use thiserror::Error;

use crate::vm::{
    devices::{
        Device, DeviceError, Hotplug, Kind, Opening, Place,
        host_requests::HostRequests,
        hotplug_kinds,
        names::{self, NameError},
    },
    error::MachineError,
    machine::Machine,
    pci_topology::{PciTopology, TopologyError},
    resources::HotplugState,
};

/// Why a device cannot be added.
#[derive(Debug, Error)]
#[error("cannot add a device")]
pub struct AddError {
    /// The field of the request that the error is about, such as `disk.port`.
    pub field: String,
    /// The cause.
    #[source]
    pub cause: AddFailure,
}

/// The cause of an [`AddError`].
#[derive(Debug, Error)]
pub enum AddFailure {
    /// None or several.
    #[error("device.add takes one device: {}", kinds_for_people())]
    NotOneDevice,
    /// The name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The name is taken, or the port is not free.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// The device cannot be opened.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The device cannot be built.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

fn kinds_for_people() -> String {
    let mut kinds: Vec<_> = hotplug_kinds().map(|(kind, _)| kind.field).collect();
    kinds.sort_unstable();
    let last = kinds.pop().unwrap_or_default();
    format!("{} or {last}", kinds.join(", "))
}

/// A device to add, as a configuration that has nothing else.
struct Addition {
    kind: &'static Kind,
    hotplug: &'static Hotplug,
    config: VmConfig,
}

impl Addition {
    /// The one device of a request.
    fn new(mut request: AddDevice) -> Result<Self, AddFailure> {
        let mut found = None;
        for (kind, hotplug) in hotplug_kinds() {
            let mut config = VmConfig::default();
            hotplug.request(&mut request, &mut config);
            if hotplug.places(&mut config).is_empty() {
                continue;
            }
            let addition = Self {
                kind,
                hotplug,
                config,
            };
            if found.replace(addition).is_some() {
                return Err(AddFailure::NotOneDevice);
            }
        }
        found.ok_or(AddFailure::NotOneDevice)
    }

    /// Assigns a name and a free port, unless the request names them.
    fn place(&mut self, topology: &PciTopology) -> Result<Added, AddError> {
        let field = self.kind.field;
        let at = |name: &str| {
            let field = format!("{field}.{name}");
            move |cause: AddFailure| AddError {
                field: field.clone(),
                cause,
            }
        };
        let mut places = self.hotplug.places(&mut self.config);
        let Some(Place {
            id: given,
            port: asked,
        }) = places.pop()
        else {
            return Err(at("id")(AddFailure::NotOneDevice));
        };
        let id = given.take();
        let id = id.unwrap_or_else(|| names::free(field, |name| topology.has(name)));
        names::check(&id).map_err(|error| at("id")(error.into()))?;
        if topology.has(&id) {
            return Err(at("id")(TopologyError::Exists(id).into()));
        }
        let port = topology.choose_port(*asked);
        let port = port.map_err(|error| at("port")(error.into()))?;
        (*given, *asked) = (Some(id.clone()), Some(port));
        Ok(Added { id, port })
    }
}

impl HotplugState {
    /// Adds the device of a request to a machine that runs or is paused.
    pub fn add(
        &mut self,
        request: AddDevice,
        descriptors: &Descriptors,
        ram: &GuestRam,
        machine: &mut Machine,
    ) -> Result<Added, AddError> {
        let mut addition = Addition::new(request).map_err(|cause| AddError {
            field: String::new(),
            cause,
        })?;
        let added = addition.place(&machine.topology)?;
        let field = addition.kind.field;
        let failed = |cause: AddFailure| AddError {
            field: field.into(),
            cause,
        };
        let mut opening = Opening {
            config: &addition.config,
            descriptors,
            ram,
            present: &self.devices,
            console: None,
        };
        let opened = (addition.kind.open)(&mut opening).map_err(|error| failed(error.into()))?;
        for device in opened {
            let plugged = self.plug(&*device, machine);
            self.devices.push(device);
            if let Err(error) = plugged {
                self.close(&added.id, machine);
                return Err(failed(error.into()));
            }
        }
        addition
            .hotplug
            .append(&mut addition.config, &mut self.config);
        Ok(added)
    }

    fn plug(&self, device: &dyn Device, machine: &mut Machine) -> Result<(), MachineError> {
        let listen = MachineError::host("wait for the host's requests");
        self.requests.follow(device).map_err(listen)?;
        machine.plug(device)
    }

    /// Closes the host side of a device that the machine no longer has, and removes it from the configuration.
    pub fn remove(&mut self, id: &str, machine: &mut Machine) {
        self.close(id, machine);
        for (_, hotplug) in hotplug_kinds() {
            hotplug.remove(&mut self.config, id);
        }
    }

    fn close(&mut self, id: &str, machine: &mut Machine) {
        let Some(device) = self.devices.take(id) else {
            return;
        };
        if device.iommu().is_some() && self.devices.iommu().is_none() {
            machine.end_dma();
        }
    }

    /// Names of the devices that the host has asked for since the last call.
    pub fn take_requests(&self) -> Vec<String> {
        HostRequests::take(&self.devices)
    }
}
