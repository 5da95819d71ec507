//! A machine's PCI devices: where they are, how they come and go while it runs, and what they tell of
//! themselves.

use std::{collections::BTreeMap, sync::Arc, sync::atomic::Ordering};

use fanlight_api::types;
use fanlight_arch::layout;
use fanlight_devices::{
    hypervisor::Hypervisor,
    memory::AddressSpace,
    pci::{
        BarKind, BarReport, Bridge, DevFn, EjectSink, FunctionContext, HostBridge, PciBus,
        PciError, PciFunction, Port, PortKind, SlotError,
    },
    vfio::VfioFunction,
    virtio::{VirtioDevice, transport::VirtioPciFunction},
};
use thiserror::Error;

use crate::{vm::machine::MachineError, vm::passthrough::PassedThrough};

/// Where what is put into a slot is on the bus behind it.
const PLUGGED: DevFn = DevFn::new(0, 0);

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
    place: Place,
    /// Number of the port that it is behind, if that has one.
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

/// A switch: GPUs share memory with what is behind the same one, whatever the processor is (Linux
/// `drivers/pci/p2pdma.c`).
struct Switch {
    /// Where the root port in front of it is.
    place: DevFn,
    /// The bus within.
    upstream: Arc<Port>,
}

/// Where a device is.
struct Place {
    /// On its own bus.
    own: DevFn,
    /// The port that it is behind, and where that is.
    behind: Option<(DevFn, Arc<Port>)>,
}

/// The devices of one machine.
pub struct Inventory {
    bus: Arc<PciBus>,
    /// The switch that ports belong to, if there is one.
    switch: Option<Switch>,
    ports: BTreeMap<u8, Arc<Port>>,
    /// Where each port is, on the root bus or in the switch.
    port_places: BTreeMap<u8, DevFn>,
    entries: Vec<Entry>,
    /// The number of the next device of the host's: none is given twice.
    next_passed: u32,
    environment: FunctionContext,
    ejected: EjectSink,
    failed: Arc<dyn Fn(&str) + Send + Sync>,
}

impl Inventory {
    /// A root bus with the host bridge. `ejected` and `failed` are told what happens to devices.
    pub fn new(
        environment: FunctionContext,
        ejected: EjectSink,
        failed: Arc<dyn Fn(&str) + Send + Sync>,
    ) -> Result<Self, MachineError> {
        let bus = Arc::new(PciBus::default());
        bus.add(Arc::new(HostBridge::default()))?;
        Ok(Self {
            bus,
            switch: None,
            ports: BTreeMap::new(),
            port_places: BTreeMap::new(),
            entries: Vec::new(),
            next_passed: 0,
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

    /// The same for a device that shares memory with passed-through ones.
    pub fn add_together(&mut self, new: NewDevice) -> Result<(), MachineError> {
        let (id, port) = (new.id.clone(), new.port);
        let function = self.function(new)?;
        let place = self.put_together(function.clone(), port)?;
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
        let function = self.passed_function(passed)?;
        let place = self.put_together(function.clone(), passed.port)?;
        self.connect_pin(&function, &place);
        self.entries.push(Entry {
            id: passed.id.clone(),
            function: Function::PassedThrough(function),
            place,
            port: passed.port,
        });
        Ok(())
    }

    fn passed_function(
        &mut self,
        passed: &PassedThrough,
    ) -> Result<Arc<VfioFunction>, MachineError> {
        let number = self.next_passed;
        self.next_passed = number.wrapping_add(1);
        Ok(VfioFunction::new(
            passed.device.clone(),
            number,
            &self.environment,
        )?)
    }

    fn connect_pin(&self, function: &VfioFunction, place: &Place) {
        let Some(pin) = function.interrupt_pin() else {
            return;
        };
        // A bridge passes a pin on rotated by the device's number behind it.
        let (mut device, mut pin) = (place.own.device(), pin);
        let port = place.behind.as_ref().map(|(place, _)| *place);
        let switch = self.switch.as_ref().map(|switch| switch.place);
        for above in port.into_iter().chain(port.and(switch)) {
            pin = (pin + device) % 4;
            device = above.device();
        }
        function.connect_pin(&*self.environment.hypervisor, layout::pci_irq(device, pin));
    }

    /// Puts a function on the root bus or behind a port.
    fn put(
        &mut self,
        function: Arc<dyn PciFunction>,
        port: Option<u8>,
    ) -> Result<Place, MachineError> {
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

    /// Puts a function where those are that share memory with each other: in the switch, if there is one and no port
    /// is named.
    fn put_together(
        &mut self,
        function: Arc<dyn PciFunction>,
        port: Option<u8>,
    ) -> Result<Place, MachineError> {
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

    /// A place behind a port that has a number.
    fn behind(&self, number: u8, own: DevFn) -> Place {
        let place = self.port_places.get(&number);
        let port = self.ports.get(&number);
        Place {
            own,
            behind: place.copied().zip(port.cloned()),
        }
    }

    /// Makes a switch: ports are its ports from now on. It has no access control services, so that what is behind it
    /// reaches each other without the root complex.
    pub fn make_switch(&mut self) -> Result<(), MachineError> {
        let root = self.make_port(PortKind::Root, 0)?;
        let upstream = self.make_port(PortKind::Upstream, 0)?;
        root.bus().add_port(upstream.clone())?;
        let place = self.bus.add_port(root)?;
        self.switch = Some(Switch { place, upstream });
        Ok(())
    }

    fn make_port(&self, kind: PortKind, slot: u8) -> Result<Arc<Port>, MachineError> {
        let vector = self.environment.hypervisor.msi_vector();
        let vector = vector.map_err(|source| MachineError::Host {
            action: "make an interrupt",
            source,
        })?;
        Ok(Arc::new(Port::new(
            kind,
            slot,
            vector,
            self.ejected.clone(),
        )))
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
    fn port(&mut self, number: u8) -> Result<Arc<Port>, MachineError> {
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
        let (id, asked) = (new.id.clone(), new.port);
        let (number, port) = self.slot(&id, asked)?;
        let function = self.function(new)?;
        port.plug(function.clone())?;
        self.plugged(id, Function::Virtio(function), number);
        Ok(())
    }

    /// The same for a device of the host's.
    pub fn plug_passed_through(&mut self, passed: &PassedThrough) -> Result<(), InventoryError> {
        let (number, port) = self.slot(&passed.id, passed.port)?;
        let function = self.passed_function(passed)?;
        self.connect_pin(&function, &self.behind(number, PLUGGED));
        port.plug(function.clone())?;
        self.plugged(passed.id.clone(), Function::PassedThrough(function), number);
        Ok(())
    }

    /// The free slot for a device that is to come.
    fn slot(&self, id: &str, asked: Option<u8>) -> Result<(u8, Arc<Port>), InventoryError> {
        if self.has(id) {
            return Err(InventoryError::Exists(id.to_owned()));
        }
        let number = self.choose_port(asked)?;
        let port = self.ports.get(&number).ok_or(InventoryError::NoSlot)?;
        Ok((number, port.clone()))
    }

    fn plugged(&mut self, id: String, function: Function, port: u8) {
        self.entries.push(Entry {
            id,
            function,
            place: self.behind(port, PLUGGED),
            port: Some(port),
        });
    }

    /// Takes a device of the host's away, whatever the guest does with it.
    pub fn take_away(&mut self, id: &str) {
        let Some(at) = self.entries.iter().position(|entry| entry.id == id) else {
            return;
        };
        let entry = self.entries.remove(at);
        match &entry.place.behind {
            Some((_, port)) => port.force_remove(),
            None => self.bus.remove(entry.place.own),
        }
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
        Ok(port.ok_or(SlotError::Empty(number))?.request_unplug()?)
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
        let behind = entry.place.behind.as_ref();
        let bus = behind.map_or(0, |(_, port)| *port.forwarded_buses().start());
        let bars = bars.map(|bar| types::Bar {
            index: bar.index as u8,
            kind: match bar.kind {
                BarKind::Io => "io",
                BarKind::Memory32 { .. } => "memory32",
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
            address: format!("0000:{bus:02x}:{}", entry.place.own),
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
