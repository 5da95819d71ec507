//! A device's PCI function in one life of the machine, and what it reports to the API.

use std::sync::{Arc, atomic::Ordering};

use fanlight_api::types;
use fanlight_devices::{
    hypervisor::Hypervisor,
    pci::{BarKind, BarReport, PciFunction},
    vfio::VfioFunction,
    virtio::transport::VirtioPciFunction,
};

/// A device's PCI function, by who implements the device.
#[derive(Clone)]
pub enum Function {
    /// Fanlight.
    Virtio(Arc<VirtioPciFunction>),
    /// The host.
    PassedThrough(Arc<VfioFunction>),
}

/// What a function reports to `device.list`.
pub struct Report {
    /// Name of the device's type, such as `block`.
    pub kind: &'static str,
    /// Its BARs.
    pub bars: Vec<types::Bar>,
    /// Virtio features that it offers; zero for a passed-through device.
    pub offered_features: u64,
    /// Virtio features that the driver took.
    pub driver_features: u64,
    /// Whether a driver uses it.
    pub active: bool,
}

impl Function {
    /// The function as a PCI bus has it.
    pub fn pci(&self) -> Arc<dyn PciFunction> {
        match self {
            Function::Virtio(function) => function.clone(),
            Function::PassedThrough(function) => function.clone(),
        }
    }

    /// Calls `failed` when the device needs a reset by its driver. Passed-through devices never do.
    pub fn on_error(&self, failed: impl Fn() + Send + Sync + 'static) {
        if let Function::Virtio(function) = self {
            function.device_status().set_on_error(Box::new(failed));
        }
    }

    /// Tells the driver that the device's configuration has changed.
    pub fn config_changed(&self) {
        if let Function::Virtio(function) = self {
            function.device_status().config_changed();
        }
    }

    /// The pin that the function interrupts with, 0 for INTA. Virtio functions use messages only.
    pub fn interrupt_pin(&self) -> Option<u8> {
        match self {
            Function::Virtio(_) => None,
            Function::PassedThrough(function) => function.interrupt_pin(),
        }
    }

    /// Connects the pin to line `gsi`.
    pub fn connect_pin(&self, hypervisor: &dyn Hypervisor, gsi: u32) {
        if let Function::PassedThrough(function) = self {
            function.connect_pin(hypervisor, gsi);
        }
    }

    /// What it reports to `device.list`.
    pub fn report(&self) -> Report {
        match self {
            Function::Virtio(function) => {
                let report = function.report();
                Report {
                    kind: report.name,
                    bars: report.bars.into_iter().map(bar).collect(),
                    offered_features: report.offered,
                    driver_features: report.taken,
                    active: report.active,
                }
            }
            Function::PassedThrough(function) => Report {
                kind: "vfio",
                bars: function.report().into_iter().map(bar).collect(),
                offered_features: 0,
                driver_features: 0,
                active: function.is_enabled(),
            },
        }
    }

    /// Errors, and traffic of each queue. A passed-through device has no counters.
    pub fn stats(&self) -> (u64, Vec<types::QueueStats>) {
        let Function::Virtio(function) = self else {
            return (0, Vec::new());
        };
        let queues = (0..).zip(function.counters());
        let queues = queues.map(|(queue, counters)| types::QueueStats {
            queue,
            requests: counters.requests.load(Ordering::Relaxed),
            bytes_from_guest: counters.from_guest.load(Ordering::Relaxed),
            bytes_to_guest: counters.to_guest.load(Ordering::Relaxed),
        });
        (function.device_status().errors(), queues.collect())
    }
}

fn bar(bar: BarReport) -> types::Bar {
    let kind = match bar.kind {
        BarKind::Io => "io",
        BarKind::Memory32 { .. } => "memory32",
        BarKind::Memory64 { .. } => "memory64",
        BarKind::Rom => "rom",
    };
    types::Bar {
        index: bar.index as u8,
        kind: kind.into(),
        address: bar.address,
        size: bar.size,
    }
}
