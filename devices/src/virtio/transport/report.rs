//! What a function is and does now, for people and programs outside of the machine.

use super::{function::VirtioPciFunction, layout::TRANSPORT_FEATURES};
use crate::{pci::BarReport, virtio::QueueCounters};

/// A function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionReport {
    /// The device's name: "block", "net".
    pub name: &'static str,
    /// BARs.
    pub bars: Vec<BarReport>,
    /// Feature bits offered, the transport's included.
    pub offered: u64,
    /// Feature bits that the driver took.
    pub taken: u64,
    /// Whether the device has its queues.
    pub active: bool,
}

impl VirtioPciFunction {
    /// What the function is and does now.
    pub fn report(&self) -> FunctionReport {
        let state = self.lock();
        FunctionReport {
            name: self.name,
            bars: state.bars.report(),
            offered: state.device.features() | TRANSPORT_FEATURES,
            taken: state.driver_features,
            active: state.active,
        }
    }

    /// What each queue has done.
    pub fn counters(&self) -> impl Iterator<Item = &QueueCounters> {
        self.counters.iter().map(|counters| &**counters)
    }
}
