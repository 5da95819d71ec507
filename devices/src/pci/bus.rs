//! Buses and the functions on them: routing of configuration accesses, and the bus numbers and addresses that
//! firmware would assign.

use std::{
    collections::BTreeMap,
    ops::{Range, RangeInclusive},
    sync::{Arc, MutexGuard},
};

use thiserror::Error;

use super::{
    bar::BarKind,
    function::{DevFn, PciFunction},
};

use crate::sync::Mutex;

/// Devices on a bus.
const DEVICES: u8 = 32;
/// Granularity of bridge windows.
const WINDOW_UNIT: u64 = 1 << 20;

/// Room in the windows of an empty slot: enough for any virtio device.
const SLOT_MEMORY32: u64 = 2 << 20;
const SLOT_MEMORY64: u64 = 64 << 20;

/// Why a bus cannot take a function, or a function has no addresses.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PciError {
    /// All device numbers are in use.
    #[error("the PCI bus has {DEVICES} devices already: put some behind a root port (port)")]
    Full,
    /// All bus numbers are in use.
    #[error("there are more than 255 PCI buses: use fewer ports")]
    TooManyBuses,
    /// A window is too small.
    #[error("no room for a BAR of {size:#x} bytes in the {window} PCI window")]
    NoRoom {
        /// Size asked for.
        size: u64,
        /// Which window.
        window: &'static str,
    },
}

/// Address ranges from which BARs and bridge windows are taken.
#[derive(Clone, Debug)]
pub struct Windows {
    /// Below 4 GiB, for BARs that cannot go higher.
    pub memory32: Range<u64>,
    /// Prefetchable, above RAM. May be empty.
    pub memory64: Range<u64>,
    /// Ports.
    pub io: Range<u64>,
}

/// A bridge to another bus, as the bus that it is on sees it.
pub trait Bridge: PciFunction {
    /// The bus behind it.
    fn bus(&self) -> &PciBus;

    /// The buses whose configuration accesses it forwards. Its secondary bus is the first.
    fn forwarded_buses(&self) -> RangeInclusive<u8>;

    /// Numbers the buses. For the machine, before the guest runs.
    fn set_buses(&self, primary: u8, secondary: u8, subordinate: u8);

    /// Opens the windows, half-open ranges of whole MiB, and forwards accesses. `None` closes one.
    fn set_windows(&self, memory: Option<(u64, u64)>, prefetchable: Option<(u64, u64)>);
}

#[derive(Clone)]
enum Node {
    Endpoint(Arc<dyn PciFunction>),
    Bridge(Arc<dyn Bridge>),
}

impl Node {
    fn function(&self) -> &dyn PciFunction {
        match self {
            Node::Endpoint(function) => &**function,
            Node::Bridge(port) => &**port,
        }
    }
}

/// One bus.
#[derive(Default)]
pub struct PciBus {
    nodes: Mutex<BTreeMap<DevFn, Node>>,
}

impl PciBus {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<DevFn, Node>> {
        self.nodes.lock()
    }

    fn insert(&self, node: Node) -> Result<DevFn, PciError> {
        let mut nodes = self.lock();
        let place = (0..DEVICES)
            .map(|device| DevFn::new(device, 0))
            .find(|place| !nodes.contains_key(place))
            .ok_or(PciError::Full)?;
        nodes.insert(place, node);
        Ok(place)
    }

    /// Adds a function as a device of its own.
    pub fn add(&self, function: Arc<dyn PciFunction>) -> Result<DevFn, PciError> {
        self.insert(Node::Endpoint(function))
    }

    /// Takes the function at `place` off the bus.
    pub fn remove(&self, place: DevFn) {
        // Dropping a function may wait for its threads: the lock is released before.
        let node = self.lock().remove(&place);
        drop(node);
    }

    /// Takes every function off the bus.
    pub fn clear(&self) {
        self.lock().clear();
    }

    /// Resets every function on the bus.
    pub fn reset(&self) {
        // No lock is held meanwhile: functions wait for their threads.
        let nodes: Vec<_> = self.lock().values().cloned().collect();
        for node in nodes {
            node.function().reset();
        }
    }

    /// Adds a port.
    pub fn add_port(&self, port: Arc<dyn Bridge>) -> Result<DevFn, PciError> {
        self.insert(Node::Bridge(port))
    }

    /// Runs `access` on the function at `bus` and `place`, where this bus has number `number`.
    fn with_function(
        &self,
        number: u8,
        bus: u8,
        place: DevFn,
        access: &mut dyn FnMut(&dyn PciFunction),
    ) {
        let nodes = self.lock();
        if number == bus {
            let node = nodes.get(&place).cloned();
            drop(nodes);
            if let Some(node) = node {
                access(node.function());
            }
            return;
        }
        let port = nodes.values().find_map(|node| match node {
            Node::Bridge(port) if port.forwarded_buses().contains(&bus) => Some(port.clone()),
            _ => None,
        });
        drop(nodes);
        // A guest may number buses so that a port leads back up. The bus behind a port is deeper than the port, so
        // this ends.
        if let Some(port) = port {
            let secondary = *port.forwarded_buses().start();
            port.bus().with_function(secondary, bus, place, access);
        }
    }

    /// A read of configuration space by the guest, by bus number; this bus is number 0. A missing function reads as
    /// ones.
    pub fn read_config(&self, bus: u8, place: DevFn, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        self.with_function(0, bus, place, &mut |function| {
            function.read_config(offset, data);
        });
    }

    /// A write of configuration space by the guest, by bus number.
    pub fn write_config(&self, bus: u8, place: DevFn, offset: u16, data: &[u8]) {
        self.with_function(0, bus, place, &mut |function| {
            function.write_config(offset, data);
        });
    }

    /// Numbers buses and places BARs and bridge windows, as firmware does. Returns the number of the last bus.
    pub fn assign(&self, windows: &Windows) -> Result<u8, PciError> {
        let mut free = Free::new(windows);
        let mut last = 0;
        for node in self.lock().values() {
            match node {
                Node::Endpoint(function) => free.place(std::slice::from_ref(function))?,
                Node::Bridge(port) => port.bus().assign_behind(&**port, 0, &mut last, &mut free)?,
            }
        }
        Ok(last)
    }

    /// The same for this bus, which is behind `port` of bus `primary`.
    fn assign_behind(
        &self,
        port: &dyn Bridge,
        primary: u8,
        last: &mut u8,
        free: &mut Free,
    ) -> Result<(), PciError> {
        *last = last.checked_add(1).ok_or(PciError::TooManyBuses)?;
        let own = *last;
        free.align(WINDOW_UNIT);
        let before = (free.memory32.start, free.memory64.start);
        let nodes: Vec<_> = self.lock().values().cloned().collect();
        let functions: Vec<_> = nodes
            .iter()
            .filter_map(|node| match node {
                Node::Endpoint(function) => Some(function.clone()),
                Node::Bridge(_) => None,
            })
            .collect();
        free.place(&functions)?;
        for node in &nodes {
            if let Node::Bridge(port) = node {
                port.bus().assign_behind(&**port, own, last, free)?;
            }
        }
        if nodes.is_empty() {
            free.reserve(SLOT_MEMORY32, SLOT_MEMORY64);
        }
        free.align(WINDOW_UNIT);
        let window = |from, to| (from != to).then_some((from, to));
        port.set_buses(primary, own, *last);
        port.set_windows(
            window(before.0, free.memory32.start),
            window(before.1, free.memory64.start),
        );
        Ok(())
    }
}

/// The free parts of the windows.
struct Free {
    memory32: Range<u64>,
    memory64: Range<u64>,
    io: Range<u64>,
}

impl Free {
    fn new(windows: &Windows) -> Self {
        Self {
            memory32: windows.memory32.clone(),
            memory64: windows.memory64.clone(),
            io: windows.io.clone(),
        }
    }

    fn align(&mut self, unit: u64) {
        self.memory32.start = self.memory32.start.next_multiple_of(unit);
        self.memory64.start = self.memory64.start.next_multiple_of(unit);
    }

    /// Reserves room for a device to be plugged, as far as there is any.
    fn reserve(&mut self, memory32: u64, memory64: u64) {
        let take = |window: &mut Range<u64>, size| {
            window.start = window.start.saturating_add(size).min(window.end);
        };
        take(&mut self.memory32, memory32);
        take(&mut self.memory64, memory64);
    }

    /// Places the BARs of `functions`, the largest first, so that alignment wastes nothing.
    fn place(&mut self, functions: &[Arc<dyn PciFunction>]) -> Result<(), PciError> {
        let mut bars: Vec<_> = functions
            .iter()
            .flat_map(|function| function.bars().into_iter().map(move |bar| (function, bar)))
            .collect();
        bars.sort_by_key(|(_, (.., size))| std::cmp::Reverse(*size));
        for (function, (index, kind, size)) in bars {
            let (window, name) = match kind {
                BarKind::Io => (&mut self.io, "I/O"),
                BarKind::Memory64 { prefetchable: true } if !self.memory64.is_empty() => {
                    (&mut self.memory64, "64-bit")
                }
                _ => (&mut self.memory32, "32-bit"),
            };
            let start = window.start.next_multiple_of(size);
            let end = start
                .checked_add(size)
                .filter(|&end| end <= window.end)
                .ok_or(PciError::NoRoom { size, window: name })?;
            window.start = end;
            function.place_bar(index, start);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::bridge::Port;

    /// A function that remembers where it was put.
    struct Function(u8, Mutex<Vec<u64>>, Vec<(usize, BarKind, u64)>);

    impl PciFunction for Function {
        fn read_config(&self, _: u16, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn write_config(&self, _: u16, _: &[u8]) {}
        fn bars(&self) -> Vec<(usize, BarKind, u64)> {
            self.2.clone()
        }
        fn place_bar(&self, _: usize, address: u64) {
            self.1.lock().push(address);
        }
    }

    fn function(id: u8, sizes: &[u64]) -> Arc<Function> {
        let kind = BarKind::Memory64 { prefetchable: true };
        let bars = sizes.iter().map(|&size| (0, kind, size)).collect();
        Arc::new(Function(id, Mutex::default(), bars))
    }

    fn windows() -> Windows {
        Windows {
            memory32: 0xc000_0000..0xe000_0000,
            memory64: 1 << 39..1 << 40,
            io: 0x1000..0xffff,
        }
    }

    fn read(bus: &PciBus, number: u8, device: u8) -> u8 {
        let mut byte = [0];
        bus.read_config(number, DevFn::new(device, 0), 0, &mut byte);
        byte[0]
    }

    #[test]
    fn accesses_follow_the_bus_numbers() {
        let bus = PciBus::default();
        let port = Port::for_tests(1);
        bus.add(function(0x11, &[])).unwrap();
        bus.add_port(port.clone()).unwrap();
        port.bus().add(function(0x22, &[])).unwrap();
        assert_eq!(bus.assign(&windows()), Ok(1));
        assert_eq!(read(&bus, 0, 0), 0x11);
        assert_eq!(read(&bus, 1, 0), 0x22);
        assert_eq!(read(&bus, 1, 1), 0xff);
        assert_eq!(read(&bus, 2, 0), 0xff);
        port.set_buses(0, 7, 9);
        assert_eq!(read(&bus, 1, 0), 0xff);
        assert_eq!(read(&bus, 7, 0), 0x22);
        assert_eq!(read(&bus, 8, 0), 0xff);
    }

    #[test]
    fn a_switch_is_numbered_and_its_windows_lie_in_each_other() {
        let bus = PciBus::default();
        let [root, up, down, other] = [1, 2, 3, 4].map(Port::for_tests);
        let far = function(0x33, &[1 << 24]);
        bus.add_port(root.clone()).unwrap();
        root.bus().add_port(up.clone()).unwrap();
        up.bus().add_port(down.clone()).unwrap();
        up.bus().add_port(other.clone()).unwrap();
        down.bus().add(far.clone()).unwrap();
        assert_eq!(bus.assign(&windows()), Ok(4));
        let buses = [&root, &up, &down, &other].map(|port| port.forwarded_buses());
        assert_eq!(buses, [1..=4, 2..=4, 3..=3, 4..=4]);
        assert_eq!(read(&bus, 3, 0), 0x33);
        assert_eq!(read(&bus, 4, 0), 0xff);
        // A guest that numbers buses in a circle gets nowhere, and neither does the host.
        up.set_buses(1, 0, 255);
        down.set_buses(0, 0, 255);
        read(&bus, 3, 0);
    }

    #[test]
    fn bars_are_aligned_and_behind_their_ports_window() {
        let bus = PciBus::default();
        let port = Port::for_tests(1);
        let (near, far) = (function(1, &[0x4000]), function(2, &[1 << 14, 1 << 34]));
        bus.add(near.clone()).unwrap();
        bus.add_port(port.clone()).unwrap();
        port.bus().add(far.clone()).unwrap();
        bus.assign(&windows()).unwrap();
        assert_eq!(*near.1.lock(), [1 << 39]);
        let far = far.1.lock().clone();
        assert_eq!(far[0] % (1 << 34), 0);
        assert!(far[1] >= far[0] + (1 << 34));
    }

    #[test]
    fn a_bar_larger_than_its_window_is_refused_by_name() {
        let bus = PciBus::default();
        bus.add(function(1, &[1 << 50])).unwrap();
        let error = bus.assign(&windows()).unwrap_err();
        assert!(error.to_string().contains("64-bit PCI window"), "{error}");
    }

    #[test]
    fn a_33rd_device_is_refused() {
        let bus = PciBus::default();
        for _ in 0..DEVICES {
            bus.add(function(0, &[])).unwrap();
        }
        assert_eq!(bus.add(function(0, &[])), Err(PciError::Full));
    }
}
