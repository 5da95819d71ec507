//! Properties and state of a function, for `device.list`.

use super::{function::VirtioPciFunction, layout::TRANSPORT_FEATURES};
use crate::{pci::BarReport, virtio::QueueCounters};

/// A function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionReport {
    /// The device's name: "block", "net".
    pub name: &'static str,
    /// BARs.
    pub bars: Vec<BarReport>,
    /// Offered feature bits, including the transport's.
    pub offered: u64,
    /// Feature bits that the driver accepted.
    pub taken: u64,
    /// Whether the device has its queues.
    pub active: bool,
}

impl VirtioPciFunction {
    /// The function's properties and state.
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

    /// Counters of each queue.
    pub fn counters(&self) -> impl Iterator<Item = &QueueCounters> {
        self.counters.iter().map(|counters| &**counters)
    }
}
