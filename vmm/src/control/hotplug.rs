//! Devices that come and go while the machine runs: on `device.add`, when the guest releases one, and when the host
//! wants a passed-through device back.

use fanlight_api::{
    ApiError,
    socket::Descriptors,
    types::{AddDevice, Added, EventName},
};
use fanlight_devices::error_line;

use crate::control::{errors, running::RunningMachine};

impl RunningMachine<'_> {
    /// `device.add`.
    pub fn add_device(
        &mut self,
        add: AddDevice,
        descriptors: &Descriptors,
    ) -> Result<Added, ApiError> {
        let hotplug = &mut self.hotplug;
        let added = hotplug.add(add, descriptors, self.ram, &mut self.machine);
        let added = added.map_err(|error| errors::add(&error))?;
        self.queue.set_config(&self.hotplug.config);
        let events = &self.queue.events;
        events.publish_device(EventName::DeviceAdded, &added.id);
        Ok(added)
    }

    /// Handles the host's requests for passed-through devices. The first request asks the guest to release the device;
    /// the second removes it by force.
    pub fn take_requests(&mut self) {
        for id in self.hotplug.take_requests() {
            if self.requested.insert(id.clone()) {
                tracing::warn!(
                    id,
                    "the host wants a device back: the guest is asked to release it"
                );
                let events = &self.queue.events;
                events.publish_device(EventName::DeviceRequested, &id);
                if let Err(error) = self.machine.topology.request_unplug(&id) {
                    tracing::info!(id, "the guest cannot be asked: {}", error_line(&error));
                }
            } else {
                tracing::warn!(
                    id,
                    "the host takes a device away that the guest has not released"
                );
                self.machine.topology.force_remove(&id);
                self.removed(&id);
            }
        }
    }

    /// A device was removed: closes its files and devices of the host.
    pub fn removed(&mut self, id: &str) {
        self.hotplug.remove(id, &mut self.machine);
        self.requested.remove(id);
        self.queue.set_config(&self.hotplug.config);
        tracing::info!(id, "a device is gone");
        let events = &self.queue.events;
        events.publish_device(EventName::DeviceRemoved, id);
    }
}
