//! Function 00:00.0: the host bridge, which guests expect and which does nothing.

use super::{
    bar::BarKind,
    config::{ConfigSpace, Identity},
    function::PciFunction,
};

use crate::sync::Mutex;

/// Red Hat's id for a generic PCI Express host bridge (QEMU `docs/specs/pci-ids`).
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    class: 0x06_0000,
    revision: 0,
    subsystem: (0, 0),
};

/// The host bridge.
pub struct HostBridge(Mutex<ConfigSpace>);

impl Default for HostBridge {
    fn default() -> Self {
        Self(Mutex::new(ConfigSpace::new(0, IDENTITY)))
    }
}

impl PciFunction for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let config = self.0.lock();
        config.read(offset.into(), data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let mut config = self.0.lock();
        config.write(offset.into(), data);
    }

    fn bars(&self) -> Vec<(usize, BarKind, u64)> {
        Vec::new()
    }

    fn place_bar(&self, _index: usize, _address: u64) {}
}
