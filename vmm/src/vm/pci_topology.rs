//! The PCI topology of a machine: root bus, switch, ports and slots, and the devices in them.

use std::{collections::BTreeMap, io, sync::Arc};

use fanlight_api::types;
use fanlight_arch::layout;
use fanlight_devices::{
    hypervisor::Hypervisor,
    pci::{
        Bridge, DevFn, EjectSink, HostBridge, PciBus, PciError, PciFunction, Port, PortKind,
        SlotError,
    },
};
use thiserror::Error;

use crate::vm::{
    fault::{Classify, Fault},
    function::Function,
};

/// Address of a plugged device on the bus behind its port.
const PLUGGED: DevFn = DevFn::new(0, 0);

/// A device to add to a machine.
pub struct NewDevice {
    /// Its name.
    pub id: String,
    /// Its PCI function.
    pub function: Function,
    /// The port to put it behind; if absent, on the root bus.
    pub port: Option<u8>,
    /// Whether it goes into the switch, if there is one and no port is named.
    pub in_switch: bool,
}

/// A device in the machine.
struct Entry {
    id: String,
    function: Function,
    place: Place,
    /// Number of the port that it is behind, if that has one.
    port: Option<u8>,
}

impl NewDevice {
    fn at(self, place: Place) -> Entry {
        Entry {
            id: self.id,
            function: self.function,
            place,
            port: self.port,
        }
    }
}

/// Why a device cannot be added or removed.
#[derive(Debug, Error)]
pub enum TopologyError {
    /// No device of that name.
    #[error("there is no device {0:?}; device.list has their names")]
    NotFound(String),
    /// The name is taken.
    #[error("there is a device {0:?} already; give another id")]
    Exists(String),
    /// No slot is free.
    #[error("no free slot: take a device out, or start the machine with more hotplug_ports")]
    NoSlot,
    /// There is no such port.
    #[error("there is no port {port}; {}", free_ports(free))]
    NoPort {
        /// What was asked for.
        port: u8,
        /// Ports that are free.
        free: Vec<u8>,
    },
    /// Not behind a port.
    #[error("{0:?} is not behind a root port, so it stays: start the machine with it at a port")]
    Fixed(String),
    /// Other devices are in the same slot.
    #[error("{0:?} shares its port with other devices, so it stays")]
    Shared(String),
    /// The slot.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The bus.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// The host gives a port no interrupt.
    #[error("cannot make a port's interrupt")]
    Interrupt(#[source] io::Error),
}

impl Classify for TopologyError {
    fn fault(&self) -> Fault {
        match self {
            Self::NotFound(_)
            | Self::Exists(_)
            | Self::NoSlot
            | Self::NoPort { .. }
            | Self::Fixed(_)
            | Self::Shared(_) => Fault::Input,
            Self::Slot(error) => error.fault(),
            Self::Pci(error) => error.fault(),
            Self::Interrupt(_) => Fault::Host,
        }
    }
}

fn free_ports(free: &[u8]) -> String {
    match free {
        [] => "none is free".into(),
        free => {
            let free: Vec<_> = free.iter().map(u8::to_string).collect();
            format!("free are {}", free.join(", "))
        }
    }
}

/// A PCIe switch. Devices behind the same one can do peer-to-peer DMA on every processor (Linux
/// `drivers/pci/p2pdma.c`).
struct Switch {
    /// Address of the root port above it.
    place: DevFn,
    /// Its upstream port.
    upstream: Arc<Port>,
}

/// The location of a device.
struct Place {
    /// Its address on its bus.
    own: DevFn,
    /// The port that it is behind, with the address of the port.
    behind: Option<(DevFn, Arc<Port>)>,
}

/// Takes the name of a device that needs a reset by its driver.
pub type FailureSink = Arc<dyn Fn(&str) + Send + Sync>;

/// The PCI devices of one machine.
pub struct PciTopology {
    bus: Arc<PciBus>,
    /// The switch that ports belong to, if there is one.
    switch: Option<Switch>,
    ports: BTreeMap<u8, Arc<Port>>,
    /// Where each port is, on the root bus or in the switch.
    port_places: BTreeMap<u8, DevFn>,
    entries: Vec<Entry>,
    hypervisor: Arc<dyn Hypervisor>,
    ejected: EjectSink,
    failed: FailureSink,
}

impl PciTopology {
    /// A root bus with the host bridge. `ejected` takes slots that the guest released, `failed` devices that need a reset.
    pub fn new(
        hypervisor: Arc<dyn Hypervisor>,
        ejected: EjectSink,
        failed: FailureSink,
    ) -> Result<Self, TopologyError> {
        let bus = Arc::new(PciBus::default());
        bus.add(Arc::new(HostBridge::default()))?;
        Ok(Self {
            bus,
            switch: None,
            ports: BTreeMap::new(),
            port_places: BTreeMap::new(),
            entries: Vec::new(),
            hypervisor,
            ejected,
            failed,
        })
    }

    /// The root bus.
    pub fn bus(&self) -> Arc<PciBus> {
        self.bus.clone()
    }

    /// Adds a device before the guest runs.
    pub fn add(&mut self, new: NewDevice) -> Result<(), TopologyError> {
        let function = new.function.pci();
        let place = if new.in_switch {
            self.put_in_switch(function, new.port)?
        } else {
            self.put(function, new.port)?
        };
        self.connect(&new, &place);
        self.entries.push(new.at(place));
        Ok(())
    }

    /// Plugs a device into a free slot while the guest runs: the slot that it names, or the first.
    pub fn plug(&mut self, mut new: NewDevice) -> Result<(), TopologyError> {
        if self.has(&new.id) {
            return Err(TopologyError::Exists(new.id));
        }
        let number = self.choose_port(new.port)?;
        new.port = Some(number);
        let place = self.behind(number, PLUGGED);
        self.connect(&new, &place);
        let port = self.ports.get(&number).ok_or(TopologyError::NoSlot)?;
        port.plug(new.function.pci())?;
        self.entries.push(new.at(place));
        Ok(())
    }

    /// Connects a device's failures and interrupt pin, before its driver sees it.
    fn connect(&self, new: &NewDevice, place: &Place) {
        let (failed, id) = (self.failed.clone(), new.id.clone());
        new.function.on_error(move || failed(&id));
        self.connect_pin(&new.function, place);
    }

    fn connect_pin(&self, function: &Function, place: &Place) {
        let Some(pin) = function.interrupt_pin() else {
            return;
        };
        // A bridge rotates the pin by the device number behind it (PCI-to-PCI Bridge Architecture 1.2, 9.1).
        let (mut device, mut pin) = (place.own.device(), pin);
        let port = place.behind.as_ref().map(|(place, _)| *place);
        let switch = self.switch.as_ref().map(|switch| switch.place);
        for above in port.into_iter().chain(port.and(switch)) {
            pin = (pin + device) % 4;
            device = above.device();
        }
        function.connect_pin(&*self.hypervisor, layout::pci_irq(device, pin));
    }

    /// Puts a function on the root bus or behind a port.
    fn put(
        &mut self,
        function: Arc<dyn PciFunction>,
        port: Option<u8>,
    ) -> Result<Place, TopologyError> {
        let Some(number) = port else {
            return Ok(Place {
                own: self.bus.add(function)?,
                behind: None,
            });
        };
        let port = self.port(number)?;
        let own = port.insert(function)?;
        Ok(self.behind(number, own))
    }

    /// Puts a function into the switch, if there is one and no port is named.
    fn put_in_switch(
        &mut self,
        function: Arc<dyn PciFunction>,
        port: Option<u8>,
    ) -> Result<Place, TopologyError> {
        let (Some(switch), None) = (&self.switch, port) else {
            return self.put(function, port);
        };
        let upstream = switch.upstream.clone();
        let port = self.make_port(PortKind::Downstream, 0)?;
        let place = upstream.bus().add_port(port.clone())?;
        let own = port.insert(function)?;
        Ok(Place {
            own,
            behind: Some((place, port)),
        })
    }

    /// The location behind a numbered port.
    fn behind(&self, number: u8, own: DevFn) -> Place {
        let place = self.port_places.get(&number);
        let port = self.ports.get(&number);
        Place {
            own,
            behind: place.copied().zip(port.cloned()),
        }
    }

    /// Adds a switch, which has all ports from now on. It has no Access Control Services: peer-to-peer DMA behind it
    /// does not pass the root complex.
    pub fn make_switch(&mut self) -> Result<(), TopologyError> {
        let root = self.make_port(PortKind::Root, 0)?;
        let upstream = self.make_port(PortKind::Upstream, 0)?;
        root.bus().add_port(upstream.clone())?;
        let place = self.bus.add_port(root)?;
        self.switch = Some(Switch { place, upstream });
        Ok(())
    }

    fn make_port(&self, kind: PortKind, slot: u8) -> Result<Arc<Port>, TopologyError> {
        let vector = self.hypervisor.msi_vector();
        let vector = vector.map_err(TopologyError::Interrupt)?;
        Ok(Arc::new(Port::new(
            kind,
            slot,
            vector,
            self.ejected.clone(),
        )))
    }

    /// Adds empty ports of the lowest free numbers.
    pub fn add_empty_ports(&mut self, count: u8) -> Result<(), TopologyError> {
        let free: Vec<u8> = (1..=u8::MAX)
            .filter(|number| !self.ports.contains_key(number))
            .take(count.into())
            .collect();
        for number in free {
            self.port(number)?;
        }
        Ok(())
    }

    /// The port of this number. It is created when it is first named.
    fn port(&mut self, number: u8) -> Result<Arc<Port>, TopologyError> {
        if let Some(port) = self.ports.get(&number) {
            return Ok(port.clone());
        }
        let (kind, bus) = match &self.switch {
            None => (PortKind::Root, None),
            Some(switch) => (PortKind::Downstream, Some(switch.upstream.clone())),
        };
        let port = self.make_port(kind, number)?;
        let place = match bus {
            None => self.bus.add_port(port.clone())?,
            Some(upstream) => upstream.bus().add_port(port.clone())?,
        };
        self.port_places.insert(number, place);
        self.ports.insert(number, port.clone());
        Ok(port)
    }

    /// Numbers of empty ports.
    pub fn free_ports(&self) -> Vec<u8> {
        let free = self.ports.iter().filter(|(_, port)| port.is_empty());
        free.map(|(&number, _)| number).collect()
    }

    /// The port for a new device: the one that is asked for, or the first free one.
    pub fn choose_port(&self, asked: Option<u8>) -> Result<u8, TopologyError> {
        let free = self.free_ports();
        match asked {
            None => free.first().copied().ok_or(TopologyError::NoSlot),
            Some(port) if free.contains(&port) => Ok(port),
            Some(port) if self.ports.contains_key(&port) => Err(SlotError::Occupied(port).into()),
            Some(port) => Err(TopologyError::NoPort { port, free }),
        }
    }

    /// Whether a device has this name.
    pub fn has(&self, id: &str) -> bool {
        self.entries.iter().any(|entry| entry.id == id)
    }

    fn entry(&self, id: &str) -> Result<&Entry, TopologyError> {
        let entry = self.entries.iter().find(|entry| entry.id == id);
        entry.ok_or_else(|| TopologyError::NotFound(id.into()))
    }

    /// Removes a device, whatever the guest does with it.
    pub fn force_remove(&mut self, id: &str) {
        let Some(at) = self.entries.iter().position(|entry| entry.id == id) else {
            return;
        };
        let entry = self.entries.remove(at);
        match &entry.place.behind {
            Some((_, port)) => port.force_remove(),
            None => self.bus.remove(entry.place.own),
        }
    }

    /// Asks the guest to release a device.
    pub fn request_unplug(&self, id: &str) -> Result<(), TopologyError> {
        let entry = self.entry(id)?;
        let number = entry
            .port
            .ok_or_else(|| TopologyError::Fixed(id.to_owned()))?;
        let others = self.entries.iter().filter(|e| e.port == entry.port).count();
        if others > 1 {
            return Err(TopologyError::Shared(id.to_owned()));
        }
        let port = self.ports.get(&number);
        Ok(port.ok_or(SlotError::Empty(number))?.request_unplug()?)
    }

    /// Removes the device of a slot that the guest released, and returns its name.
    pub fn ejected(&mut self, slot: u8) -> Option<String> {
        let at = self.entries.iter().position(|e| e.port == Some(slot))?;
        let still_there = self.ports.get(&slot).is_some_and(|port| !port.is_empty());
        (!still_there).then(|| self.entries.remove(at).id)
    }

    /// Devices that the guest was asked to release and still has.
    pub fn removing(&self) -> Vec<String> {
        let asked = |entry: &&Entry| self.is_removing(entry);
        let entries = self.entries.iter().filter(asked);
        entries.map(|entry| entry.id.clone()).collect()
    }

    fn is_removing(&self, entry: &Entry) -> bool {
        let port = entry.port.and_then(|number| self.ports.get(&number));
        port.is_some_and(|port| port.is_removing())
    }

    /// Tells the driver of the device `id` that the device's configuration has changed.
    pub fn config_changed(&self, id: &str) {
        if let Ok(entry) = self.entry(id) {
            entry.function.config_changed();
        }
    }

    /// All devices, for the API.
    pub fn list(&self) -> Vec<types::Device> {
        let entries = self.entries.iter();
        entries.map(|entry| self.describe(entry)).collect()
    }

    fn describe(&self, entry: &Entry) -> types::Device {
        let report = entry.function.report();
        let behind = entry.place.behind.as_ref();
        let bus = behind.map_or(0, |(_, port)| *port.forwarded_buses().start());
        types::Device {
            id: entry.id.clone(),
            kind: report.kind.into(),
            address: format!("0000:{bus:02x}:{}", entry.place.own),
            port: entry.port,
            bars: report.bars,
            offered_features: format!("{:#x}", report.offered_features),
            driver_features: format!("{:#x}", report.driver_features),
            active: report.active,
            removing: self.is_removing(entry),
        }
    }

    /// Counters of all devices, for the API.
    pub fn stats(&self) -> Vec<types::DeviceStats> {
        let stats = |entry: &Entry| {
            let (errors, queues) = entry.function.stats();
            types::DeviceStats {
                id: entry.id.clone(),
                errors,
                queues,
            }
        };
        self.entries.iter().map(stats).collect()
    }
}
