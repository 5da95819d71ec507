//! Devices that come and go while the machine runs: on `device.add`, when the guest releases one, and when the host
//! wants a passed-through device back.

use fanlight_api::{
    ApiError, DiskConfig, NetConfig, VfioConfig,
    socket::Descriptors,
    types::{AddDevice, Added, EventName},
};
use fanlight_devices::error_line;

use crate::{
    control::{errors, running::RunningMachine},
    host::resources::{Disk, Interface, check_id, free_id},
    vm::host_requests::HostRequests,
    vm::machine::{block_device, net_device},
    vm::passthrough::Passthrough,
    vm::pci_topology::{InventoryError, NewDevice},
};

impl RunningMachine<'_> {
    /// `device.add`.
    pub fn add_device(
        &mut self,
        add: AddDevice,
        descriptors: &Descriptors,
    ) -> Result<Added, ApiError> {
        match (add.disk, add.net, add.vfio) {
            (Some(disk), None, None) => self.add_disk(disk, descriptors),
            (None, Some(net), None) => self.add_net(net, descriptors),
            (None, None, Some(vfio)) => self.add_vfio(vfio, descriptors),
            _ => Err(errors::not_one_device()),
        }
    }

    /// Name and port of a device that is to come.
    fn place(
        &self,
        kind: &str,
        id: Option<String>,
        port: Option<u8>,
    ) -> Result<(String, u8), ApiError> {
        let inventory = &self.machine.inventory;
        let id = id.unwrap_or_else(|| free_id(kind, |name| inventory.has(name)));
        check_id(&id).map_err(|error| errors::config(&error, &format!("{kind}.id")))?;
        if inventory.has(&id) {
            let error = InventoryError::Exists(id);
            return Err(errors::topology(&error, &format!("{kind}.id")));
        }
        let port = inventory
            .choose_port(port)
            .map_err(|error| errors::topology(&error, &format!("{kind}.port")))?;
        Ok((id, port))
    }

    fn plug(&mut self, device: NewDevice, kind: &str) -> Result<(), ApiError> {
        let result = self.machine.inventory.plug(device);
        result.map_err(|error| errors::topology(&error, kind))
    }

    fn add_disk(
        &mut self,
        mut config: DiskConfig,
        descriptors: &Descriptors,
    ) -> Result<Added, ApiError> {
        let (id, port) = self.place("disk", config.id, config.port)?;
        config.id = Some(id.clone());
        config.port = Some(port);
        let disk =
            Disk::open(&config, descriptors).map_err(|error| errors::config(&error, "disk"))?;
        self.plug(block_device(&disk, self.holdings.config.cpus), "disk")?;
        self.holdings.disks.push(disk);
        self.holdings.config.disk.push(config);
        Ok(self.added(id, port))
    }

    fn add_net(
        &mut self,
        mut config: NetConfig,
        descriptors: &Descriptors,
    ) -> Result<Added, ApiError> {
        let (id, port) = self.place("net", config.id, config.port)?;
        config.id = Some(id.clone());
        config.port = Some(port);
        let interface =
            Interface::open(&config, descriptors).map_err(|error| errors::config(&error, "net"))?;
        let device = net_device(&interface, self.holdings.ram.memory()).map_err(errors::machine)?;
        self.plug(device, "net")?;
        self.holdings.interfaces.push(interface);
        self.holdings.config.net.push(config);
        Ok(self.added(id, port))
    }

    fn add_vfio(
        &mut self,
        mut config: VfioConfig,
        descriptors: &Descriptors,
    ) -> Result<Added, ApiError> {
        let (id, port) = self.place("vfio", config.id, config.port)?;
        config.id = Some(id.clone());
        config.port = Some(port);
        let holdings = &mut self.holdings;
        Passthrough::add(holdings.passthrough, &config, descriptors)
            .map_err(|error| errors::config(&error.into(), "vfio"))?;
        if let Err(error) = self.plug_vfio(&id) {
            self.close_vfio(&id);
            return Err(error);
        }
        self.holdings.config.vfio.push(config);
        Ok(self.added(id, port))
    }

    fn plug_vfio(&mut self, id: &str) -> Result<(), ApiError> {
        let Some(passthrough) = &*self.holdings.passthrough else {
            return Ok(());
        };
        let Some(passed) = passthrough.find(id) else {
            return Ok(());
        };
        self.holdings
            .requests
            .follow(&passed.device)
            .map_err(|error| errors::machine(error.into()))?;
        let mem = self.holdings.ram.memory();
        self.machine
            .plug_passed_through(passed, &passthrough.iommu, mem)
            .map_err(|error| errors::topology(&error, "vfio"))
    }

    /// Closes a device of the host's that the machine has no longer, and gives it back.
    fn close_vfio(&mut self, id: &str) {
        let Some(passthrough) = &mut *self.holdings.passthrough else {
            return;
        };
        if passthrough.devices.iter().all(|passed| passed.id == id) {
            // The container forgets what is mapped with its last device.
            self.machine.end_dma();
            *self.holdings.passthrough = None;
        } else {
            passthrough.devices.retain(|passed| passed.id != id);
        }
    }

    /// The host wants passed-through devices back. The guest is asked for each first; who still has it when the host
    /// asks again loses it.
    pub fn take_requests(&mut self) {
        for id in HostRequests::take(self.holdings.passthrough.as_ref()) {
            if self.requested.insert(id.clone()) {
                tracing::warn!(
                    id,
                    "the host wants a device back: the guest is asked for it"
                );
                let events = &self.queue.events;
                events.publish_device(EventName::DeviceRequested, &id);
                if let Err(error) = self.machine.inventory.ask_back(&id) {
                    tracing::info!(id, "the guest cannot be asked: {}", error_line(&error));
                }
            } else {
                tracing::warn!(
                    id,
                    "the host takes a device away that the guest has not given up"
                );
                self.machine.inventory.take_away(&id);
                self.removed(&id);
            }
        }
    }

    fn added(&self, id: String, port: u8) -> Added {
        self.queue.set_config(self.holdings.config);
        let events = &self.queue.events;
        events.publish_device(EventName::DeviceAdded, &id);
        Added { id, port }
    }

    /// A device is gone: what it used of the host is closed.
    pub fn removed(&mut self, id: &str) {
        let holdings = &mut self.holdings;
        holdings.disks.retain(|disk| disk.id != id);
        holdings.interfaces.retain(|interface| interface.id != id);
        let is = |other: &Option<String>| other.as_deref() == Some(id);
        holdings.config.disk.retain(|disk| !is(&disk.id));
        holdings.config.net.retain(|net| !is(&net.id));
        holdings.config.vfio.retain(|device| !is(&device.id));
        self.close_vfio(id);
        self.requested.remove(id);
        let holdings = &mut self.holdings;
        self.queue.set_config(holdings.config);
        tracing::info!(id, "a device is gone");
        let events = &self.queue.events;
        events.publish_device(EventName::DeviceRemoved, id);
    }
}
