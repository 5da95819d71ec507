//! Where the configuration and `device.add` have the devices that can be added and removed.

use fanlight_api::{VmConfig, types::AddDevice};

/// An entry of the configuration whose device has a name and a port, and can be added and removed.
pub trait Entry: Sized + 'static {
    /// All of the kind in a configuration.
    fn of_config(config: &mut VmConfig) -> &mut Vec<Self>;

    /// The one in a request to add a device.
    fn of_request(request: &mut AddDevice) -> &mut Option<Self>;

    /// The device's name, and the port that it is behind.
    fn place(&mut self) -> Place<'_>;
}

/// Where an entry of the configuration has the device's name and port.
pub struct Place<'a> {
    /// The name.
    pub id: &'a mut Option<String>,
    /// The port.
    pub port: &'a mut Option<u8>,
}

/// The configuration entries of one kind, whatever their type.
pub struct Hotplug {
    places: fn(&mut VmConfig) -> Vec<Place<'_>>,
    request: fn(&mut AddDevice, &mut VmConfig),
    append: fn(&mut VmConfig, &mut VmConfig),
    remove: fn(&mut VmConfig, &str),
}

impl Hotplug {
    /// For entries of this type.
    pub const fn of<E: Entry>() -> Self {
        Self {
            places: places::<E>,
            request: request::<E>,
            append: append::<E>,
            remove: remove::<E>,
        }
    }

    /// Names and ports of the kind's devices in `config`.
    pub fn places<'a>(&self, config: &'a mut VmConfig) -> Vec<Place<'a>> {
        (self.places)(config)
    }

    /// Moves the entry of a request, if there is one, into a configuration.
    pub fn request(&self, from: &mut AddDevice, into: &mut VmConfig) {
        (self.request)(from, into);
    }

    /// Moves all entries from one configuration to the end of another.
    pub fn append(&self, from: &mut VmConfig, into: &mut VmConfig) {
        (self.append)(from, into);
    }

    /// Removes the device `id` from a configuration.
    pub fn remove(&self, config: &mut VmConfig, id: &str) {
        (self.remove)(config, id);
    }
}

fn places<E: Entry>(config: &mut VmConfig) -> Vec<Place<'_>> {
    E::of_config(config).iter_mut().map(E::place).collect()
}

fn request<E: Entry>(from: &mut AddDevice, into: &mut VmConfig) {
    E::of_config(into).extend(E::of_request(from).take());
}

fn append<E: Entry>(from: &mut VmConfig, into: &mut VmConfig) {
    E::of_config(into).append(E::of_config(from));
}

fn remove<E: Entry>(config: &mut VmConfig, id: &str) {
    E::of_config(config).retain_mut(|entry| entry.place().id.as_deref() != Some(id));
}
