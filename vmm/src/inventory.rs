//! A machine's PCI devices: where they are, how they come and go while it runs, and what they tell of
//! themselves.

use std::{collections::BTreeMap, sync::Arc, sync::atomic::Ordering};

use fanlight_api::types;
use fanlight_arch::layout;
use fanlight_devices::{
    hypervisor::Hypervisor,
    memory::AddressSpace,
    pci::{
        BarKind, BarReport, DevFn, EjectSink, HostBridge, PciBus, PciError, PciFunction, RootPort,
        SlotError,
    },
    vfio::VfioFunction,
    virtio::{
        VirtioDevice,
        pci::{Environment, VirtioPciFunction},
    },
};
use thiserror::Error;

use crate::{machine::MachineError, passthrough::PassedThrough};

/// A device that is to be part of a machine.
pub struct NewDevice {
    /// Its name.
    pub id: String,
    /// The device.
    pub device: Box<dyn VirtioDevice>,
    /// PCI class code.
    pub class: u32,
    /// Root port to put it behind; on the root bus if absent.
    pub port: Option<u8>,
}

/// A device that is part of the machine.
struct Entry {
    id: String,
    function: Function,
    place: DevFn,
    port: Option<u8>,
}

/// A device's function, by who makes the device.
enum Function {
    /// Fanlight.
    Virtio(Arc<VirtioPciFunction>),
    /// The host.
    PassedThrough(Arc<VfioFunction>),
}

impl Function {
    fn bars(&self) -> Vec<BarReport> {
        match self {
            Function::Virtio(function) => function.report().bars,
            Function::PassedThrough(function) => function.report(),
        }
    }
}

/// Why a device cannot come or go.
#[derive(Debug, Error)]
pub enum InventoryError {
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
    /// The device cannot be made.
    #[error(transparent)]
    Machine(#[from] MachineError),
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

/// The devices of one machine.
pub struct Inventory {
    bus: Arc<PciBus>,
    ports: BTreeMap<u8, Arc<RootPort>>,
    /// Where each port is on the root bus.
    port_places: BTreeMap<u8, DevFn>,
    entries: Vec<Entry>,
    environment: Environment,
    ejected: EjectSink,
    failed: Arc<dyn Fn(&str) + Send + Sync>,
}

impl Inventory {
    /// A root bus with the host bridge. `ejected` and `failed` are told what happens to devices.
    pub fn new(
        environment: Environment,
        ejected: EjectSink,
        failed: Arc<dyn Fn(&str) + Send + Sync>,
    ) -> Result<Self, MachineError> {
        let bus = Arc::new(PciBus::default());
        bus.add(Arc::new(HostBridge::default()))?;
        Ok(Self {
            bus,
            ports: BTreeMap::new(),
            port_places: BTreeMap::new(),
            entries: Vec::new(),
            environment,
            ejected,
            failed,
        })
    }

    /// The map of guest-physical addresses.
    pub fn address_space(&self) -> Arc<AddressSpace> {
        self.environment.memory.clone()
    }

    /// What devices ask for interrupts and memory slots.
    pub fn hypervisor(&self) -> Arc<dyn Hypervisor> {
        self.environment.hypervisor.clone()
    }

    /// The root bus.
    pub fn bus(&self) -> Arc<PciBus> {
        self.bus.clone()
    }

    fn function(&self, new: NewDevice) -> Result<Arc<VirtioPciFunction>, MachineError> {
        let function = VirtioPciFunction::new(new.device, new.class, &self.environment)?;
        let (failed, id) = (self.failed.clone(), new.id);
        function
            .device_status()
            .set_on_error(Box::new(move || failed(&id)));
        Ok(function)
    }

    /// Adds a device before the guest runs.
    pub fn add(&mut self, new: NewDevice) -> Result<(), MachineError> {
        let (id, port) = (new.id.clone(), new.port);
        let function = self.function(new)?;
        let place = self.put(function.clone(), port)?;
        self.entries.push(Entry {
            id,
            function: Function::Virtio(function),
            place,
            port,
        });
        Ok(())
    }

    /// Adds a device of the host's before the guest runs.
    pub fn add_passed_through(&mut self, passed: &PassedThrough) -> Result<(), MachineError> {
        let is_passed = |entry: &&Entry| matches!(entry.function, Function::PassedThrough(_));
        let number = self.entries.iter().filter(is_passed).count() as u32;
        let function = VfioFunction::new(passed.device.clone(), number, &self.environment)?;
        let place = self.put(function.clone(), passed.port)?;
        if let Some(pin) = function.interrupt_pin() {
            let port = passed.port.and_then(|port| self.port_places.get(&port));
            // A bridge passes a pin on rotated by the device's number behind it.
            let (device, pin) = match port {
                Some(port) => (port.device(), (pin + place.device()) % 4),
                None => (place.device(), pin),
            };
            function.connect_pin(&*self.environment.hypervisor, layout::pci_irq(device, pin));
        }
        self.entries.push(Entry {
            id: passed.id.clone(),
            function: Function::PassedThrough(function),
            place,
            port: passed.port,
        });
        Ok(())
    }

    /// Puts a function on the root bus or behind a port.
    fn put(
        &mut self,
        function: Arc<dyn PciFunction>,
        port: Option<u8>,
    ) -> Result<DevFn, MachineError> {
        Ok(match port {
            None => self.bus.add(function)?,
            Some(number) => self.port(number)?.insert(function)?,
        })
    }

    /// Adds ports with nothing behind them, of the lowest numbers that are free.
    pub fn add_empty_ports(&mut self, count: u8) -> Result<(), MachineError> {
        let free: Vec<u8> = (1..=u8::MAX)
            .filter(|number| !self.ports.contains_key(number))
            .take(count.into())
            .collect();
        for number in free {
            self.port(number)?;
        }
        Ok(())
    }

    /// The port of this number, which is made when it is first named.
    fn port(&mut self, number: u8) -> Result<Arc<RootPort>, MachineError> {
        if let Some(port) = self.ports.get(&number) {
            return Ok(port.clone());
        }
        let vector = self.environment.hypervisor.msi_vector();
        let vector = vector.map_err(|source| MachineError::Host {
            action: "make an interrupt",
            source,
        })?;
        let port = Arc::new(RootPort::new(number, vector, self.ejected.clone()));
        let place = self.bus.add_port(port.clone())?;
        self.port_places.insert(number, place);
        self.ports.insert(number, port.clone());
        Ok(port)
    }

    /// Ports with nothing behind them.
    pub fn free_ports(&self) -> Vec<u8> {
        let free = self.ports.iter().filter(|(_, port)| port.is_empty());
        free.map(|(&number, _)| number).collect()
    }

    /// The port for a device that is to come: the one that is asked for, or the first that is free.
    pub fn choose_port(&self, asked: Option<u8>) -> Result<u8, InventoryError> {
        let free = self.free_ports();
        match asked {
            None => free.first().copied().ok_or(InventoryError::NoSlot),
            Some(port) if free.contains(&port) => Ok(port),
            Some(port) if self.ports.contains_key(&port) => Err(SlotError::Occupied(port).into()),
            Some(port) => Err(InventoryError::NoPort { port, free }),
        }
    }

    /// Whether a device has this name.
    pub fn has(&self, id: &str) -> bool {
        self.entries.iter().any(|entry| entry.id == id)
    }

    fn entry(&self, id: &str) -> Result<&Entry, InventoryError> {
        let entry = self.entries.iter().find(|entry| entry.id == id);
        entry.ok_or_else(|| InventoryError::NotFound(id.into()))
    }

    /// Puts a device into the slot that it names, while the guest runs.
    pub fn plug(&mut self, new: NewDevice) -> Result<(), InventoryError> {
        let id = new.id.clone();
        if self.has(&id) {
            return Err(InventoryError::Exists(id));
        }
        let number = self.choose_port(new.port)?;
        let port = self
            .ports
            .get(&number)
            .ok_or(InventoryError::NoSlot)?
            .clone();
        let function = self.function(new)?;
        port.plug(function.clone())?;
        self.entries.push(Entry {
            id,
            function: Function::Virtio(function),
            place: DevFn::new(0, 0),
            port: Some(number),
        });
        Ok(())
    }

    /// Asks the guest to give a device up.
    pub fn ask_back(&self, id: &str) -> Result<(), InventoryError> {
        let entry = self.entry(id)?;
        let number = entry
            .port
            .ok_or_else(|| InventoryError::Fixed(id.to_owned()))?;
        let others = self.entries.iter().filter(|e| e.port == entry.port).count();
        if others > 1 {
            return Err(InventoryError::Shared(id.to_owned()));
        }
        let port = self.ports.get(&number);
        Ok(port.ok_or(SlotError::Empty(number))?.ask_back()?)
    }

    /// Forgets the device of a slot that the guest has given up; its name.
    pub fn ejected(&mut self, slot: u8) -> Option<String> {
        let at = self.entries.iter().position(|e| e.port == Some(slot))?;
        let still_there = self.ports.get(&slot).is_some_and(|port| !port.is_empty());
        (!still_there).then(|| self.entries.remove(at).id)
    }

    /// Devices that the guest was asked to give up, and has not.
    pub fn removing(&self) -> Vec<String> {
        let asked = |entry: &&Entry| self.is_removing(entry);
        let entries = self.entries.iter().filter(asked);
        entries.map(|entry| entry.id.clone()).collect()
    }

    fn is_removing(&self, entry: &Entry) -> bool {
        let port = entry.port.and_then(|number| self.ports.get(&number));
        port.is_some_and(|port| port.is_removing())
    }

    /// Tells a device's driver that its configuration has changed.
    pub fn config_changed(&self, id: &str) {
        if let Ok(entry) = self.entry(id)
            && let Function::Virtio(function) = &entry.function
        {
            function.device_status().config_changed();
        }
    }

    /// All devices, for the API.
    pub fn list(&self) -> Vec<types::Device> {
        let entries = self.entries.iter();
        entries.map(|entry| self.describe(entry)).collect()
    }

    fn describe(&self, entry: &Entry) -> types::Device {
        let virtio = match &entry.function {
            Function::Virtio(function) => Some(function.report()),
            Function::PassedThrough(_) => None,
        };
        let bars = entry.function.bars().into_iter();
        let port = entry.port.and_then(|number| self.ports.get(&number));
        let bus = port.map_or(0, |port| *port.forwarded_buses().start());
        let bars = bars.map(|bar| types::Bar {
            index: bar.index as u8,
            kind: match bar.kind {
                BarKind::Io => "io",
                BarKind::Memory32 => "memory32",
                BarKind::Memory64 { .. } => "memory64",
                BarKind::Rom => "rom",
            }
            .into(),
            address: bar.address,
            size: bar.size,
        });
        types::Device {
            id: entry.id.clone(),
            kind: virtio.as_ref().map_or("vfio", |report| report.name).into(),
            address: format!("0000:{bus:02x}:{}", entry.place),
            port: entry.port,
            bars: bars.collect(),
            offered_features: format!("{:#x}", virtio.as_ref().map_or(0, |report| report.offered)),
            driver_features: format!("{:#x}", virtio.as_ref().map_or(0, |report| report.taken)),
            active: match &entry.function {
                Function::Virtio(_) => virtio.is_some_and(|report| report.active),
                Function::PassedThrough(function) => function.is_enabled(),
            },
            removing: self.is_removing(entry),
        }
    }

    /// What all devices have done, for the API.
    pub fn stats(&self) -> Vec<types::DeviceStats> {
        let stats = self.entries.iter().map(|entry| {
            // What a device of the host's does, nobody here sees.
            let (errors, counters) = match &entry.function {
                Function::Virtio(f) => (f.device_status().errors(), f.counters().collect()),
                Function::PassedThrough(_) => (0, Vec::new()),
            };
            types::DeviceStats {
                id: entry.id.clone(),
                errors,
                queues: (0..)
                    .zip(counters)
                    .map(|(queue, counters)| types::QueueStats {
                        queue,
                        requests: counters.requests.load(Ordering::Relaxed),
                        bytes_from_guest: counters.from_guest.load(Ordering::Relaxed),
                        bytes_to_guest: counters.to_guest.load(Ordering::Relaxed),
                    })
                    .collect(),
            }
        });
        stats.collect()
    }
}

impl From<PciError> for InventoryError {
    fn from(error: PciError) -> Self {
        Self::Machine(error.into())
    }
}
