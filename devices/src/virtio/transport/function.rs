//! A virtio device as a PCI function: its BAR, capabilities and configuration space.

use std::sync::{Arc, MutexGuard, Weak};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{layout::*, queues::QueueRegisters, state::State};
use crate::{
    GuestMemory,
    hypervisor::Hypervisor,
    memory::IoHandler,
    pci::{
        BarContent, BarHandler, BarKind, Bars, ConfigSpace, FunctionContext, Identity, Msix,
        MsixError, PciFunction,
    },
    sync::Mutex,
    virtio::{DeviceStatus, QueueCounters, VirtioDevice},
};

/// A virtio device as a PCI function.
pub struct VirtioPciFunction {
    pub(super) state: Mutex<State>,
    /// One for each queue, for the life of the function.
    pub(super) kicks: Vec<EventFd>,
    pub(super) counters: Vec<Arc<QueueCounters>>,
    /// Configuration space after a reset.
    pub(super) initial_config: ConfigSpace,
    /// Address of the BAR for which doorbells are registered.
    pub(super) doorbells: Mutex<Option<u64>>,
    pub(super) device_status: DeviceStatus,
    pub(super) hypervisor: Arc<dyn Hypervisor>,
    pub(super) mem: GuestMemory,
    pub(super) name: &'static str,
}

/// Content of the BAR. The function owns the BAR, so this holds only a weak reference to the function.
struct Registers(Weak<VirtioPciFunction>);

impl VirtioPciFunction {
    /// Wraps a device.
    ///
    /// # Panics
    /// If the device has more than 256 queues: the number is Fanlight's choice, not the guest's.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        class: u32,
        environment: &FunctionContext,
    ) -> Result<Arc<Self>, MsixError> {
        let queues: Vec<_> = device
            .queue_sizes()
            .iter()
            .map(|&size| QueueRegisters::new(size))
            .collect();
        assert!(queues.len() <= MAX_QUEUES, "{} queues", queues.len());
        let vectors = queues.len() as u16 + 1;
        let msix = Msix::new(&*environment.hypervisor, vectors)?;
        let id = DEVICE_ID_BASE + device.device_id() as u16;
        let mut config = ConfigSpace::new(
            0,
            Identity {
                vendor: VENDOR_ID,
                device: id,
                class,
                revision: REVISION_ID,
                subsystem: (VENDOR_ID, id),
            },
        );
        let msix_at =
            config.add_capability(&msix.capability(BAR, MSIX_TABLE as u32, MSIX_PBA as u32));
        for (kind, offset, len) in [
            (VIRTIO_PCI_CAP_COMMON_CFG, COMMON, COMMON_LEN),
            (VIRTIO_PCI_CAP_ISR_CFG, ISR, 4),
            (VIRTIO_PCI_CAP_DEVICE_CFG, DEVICE, REGION_LEN),
        ] {
            config.add_capability(&capability(kind, offset, len, &[]));
        }
        let multiplier = (NOTIFY_OFF_MULTIPLIER as u32).to_le_bytes();
        config.add_capability(&capability(
            VIRTIO_PCI_CAP_NOTIFY_CFG,
            NOTIFY,
            REGION_LEN,
            &multiplier,
        ));
        let mut pci_cfg = capability(VIRTIO_PCI_CAP_PCI_CFG, 0, 0, &[0; 4]);
        pci_cfg.writable = [CAP_BAR]
            .into_iter()
            .chain(CAP_OFFSET..CAP_LENGTH + 4)
            .map(|at| (at - 2, 0xff))
            .collect();
        let pci_cfg_at = config.add_capability(&pci_cfg);
        let shared_memory = device.shared_memory();
        if let Some(memory) = &shared_memory {
            config.add_capability(&memory.capability());
        }
        let kicks = queues
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<Result<_, _>>()
            .map_err(|source| MsixError::Vector { index: 0, source })?;
        let counters = queues.iter().map(|_| Arc::default()).collect();
        Ok(Arc::new_cyclic(|this: &Weak<Self>| {
            let mut bars = Bars::new(environment.memory.clone(), environment.ports.clone());
            bars.add(
                &mut config,
                BAR.into(),
                BarKind::Memory64 { prefetchable: true },
                BAR_SIZE,
                BarContent::Registers(Arc::new(Registers(this.clone()))),
            );
            if let Some(memory) = shared_memory {
                memory.add_to(&mut bars, &mut config);
            }
            let initial_config = config.clone();
            Self {
                name: device.name(),
                state: Mutex::new(State {
                    config,
                    bars,
                    msix,
                    msix_at,
                    pci_cfg_at,
                    device,
                    status: 0,
                    device_feature_select: 0,
                    driver_feature_select: 0,
                    driver_features: 0,
                    config_vector: VIRTIO_MSI_NO_VECTOR,
                    queue_select: 0,
                    queues,
                    active: false,
                }),
                counters,
                initial_config,
                kicks,
                doorbells: Mutex::new(None),
                device_status: DeviceStatus::new(),
                hypervisor: environment.hypervisor.clone(),
                mem: environment.mem.clone(),
            }
        }))
    }

    /// The device's link to its driver, for host-side handles that change its configuration.
    pub fn device_status(&self) -> DeviceStatus {
        self.device_status.clone()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    fn read_bar(&self, state: &State, offset: u64, data: &mut [u8]) {
        match offset {
            COMMON..ISR => self.read_common(state, offset, data),
            ISR..DEVICE => data.fill(ISR_NONE),
            DEVICE..NOTIFY => state.device.read_config(offset - DEVICE, data),
            NOTIFY..MSIX_TABLE => {}
            MSIX_TABLE..MSIX_PBA => state.msix.read_table(offset - MSIX_TABLE, data),
            _ => state.msix.read_pba(offset - MSIX_PBA, data),
        }
    }

    fn write_bar(&self, state: &mut State, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => self.write_common(state, offset, data),
            DEVICE..NOTIFY => state.device.write_config(offset - DEVICE, data),
            NOTIFY..MSIX_TABLE => self.ring_doorbell(offset - NOTIFY),
            MSIX_TABLE..MSIX_PBA => state.msix.write_table(offset - MSIX_TABLE, data),
            _ => {}
        }
    }

    /// Applies the effects of a configuration space write on BARs and MSI-X.
    fn after_config_write(&self, state: &mut State, offset: usize, len: usize) {
        let touches = |start: usize, size: usize| offset < start + size && start < offset + len;
        if touches(0x04, 2) || touches(0x10, 24) {
            let State { bars, config, .. } = state;
            bars.update(config);
        }
        if touches(state.msix_at + MSIX_CONTROL, 2) {
            let control = state.config.u16(state.msix_at + MSIX_CONTROL);
            state.msix.set_control(control);
        }
    }

    /// The BAR offset that the configuration window refers to, if the access is to the window (Virtio 1.3, 4.1.4.9).
    fn pci_cfg_target(&self, state: &State, offset: usize, len: usize) -> Option<u64> {
        let at = state.pci_cfg_at;
        let bar = state.config.u32(at + CAP_BAR) as u8;
        let target = u64::from(state.config.u32(at + CAP_OFFSET));
        let window = state.config.u32(at + CAP_LENGTH) as usize;
        (offset == at + CAP_PCI_CFG_DATA
            && bar == BAR
            && window == len
            && matches!(len, 1 | 2 | 4)
            && target % len as u64 == 0
            && target < BAR_SIZE)
            .then_some(target)
    }
}

impl PciFunction for VirtioPciFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let state = self.lock();
        match self.pci_cfg_target(&state, offset.into(), data.len()) {
            Some(target) => {
                data.fill(0);
                self.read_bar(&state, target, data);
            }
            None => state.config.read(offset.into(), data),
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let mut state = self.lock();
        match self.pci_cfg_target(&state, offset.into(), data.len()) {
            Some(target) => self.write_bar(&mut state, target, data),
            None => {
                state.config.write(offset.into(), data);
                self.after_config_write(&mut state, offset.into(), data.len());
            }
        }
    }

    fn bars(&self) -> Vec<(usize, BarKind, u64)> {
        self.lock().bars.list()
    }

    fn place_bar(&self, index: usize, address: u64) {
        let State { bars, config, .. } = &mut *self.lock();
        bars.place(config, index, address);
        bars.update(config);
    }

    fn reset(&self) {
        let state = &mut *self.lock();
        self.reset_device(state);
        state.config = self.initial_config.clone();
        state.msix.reset();
        state.bars.update(&state.config);
    }
}

impl IoHandler for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(function) = self.0.upgrade() {
            function.read_bar(&function.lock(), offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(function) = self.0.upgrade() else {
            return;
        };
        if (NOTIFY..MSIX_TABLE).contains(&offset) {
            function.ring_doorbell(offset - NOTIFY);
        } else {
            function.write_bar(&mut function.lock(), offset, data);
        }
    }
}

impl BarHandler for Registers {
    /// Called with the function's state locked, so it uses only constant fields.
    fn mapped(&self, address: Option<u64>) {
        let Some(function) = self.0.upgrade() else {
            return;
        };
        function.move_doorbells(address);
    }
}

impl Drop for VirtioPciFunction {
    fn drop(&mut self) {
        self.lock().device.reset();
    }
}
