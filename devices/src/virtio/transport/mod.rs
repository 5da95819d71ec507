//! Virtio over PCI (Virtio 1.3, 4.1): modern only, MSI-X only, doorbells by ioeventfd.
//!
//! One 64-bit BAR holds everything: common configuration, ISR status, device configuration, doorbells,
//! MSI-X table and pending bits.

mod report;
mod shared_memory;

use std::sync::{Arc, MutexGuard, Weak};

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    ActivateError, Activation, ActiveQueue, DeviceStatus, VirtioDevice, queue::QueueCounters,
};
use crate::{
    GuestMemory,
    hypervisor::Hypervisor,
    memory::IoHandler,
    pci::{
        BarContent, BarHandler, BarKind, Bars, Capability, ConfigSpace, FunctionContext, Identity,
        Msix, MsixError, PBA_ENTRY, PciFunction, TABLE_ENTRY,
    },
    sync::Mutex,
};

pub use report::FunctionReport;
pub use shared_memory::SharedMemory;

const VENDOR_ID: u16 = 0x1af4;
/// Modern devices have their virtio device id on top of this.
const DEVICE_ID_BASE: u16 = 0x1040;
/// Non-transitional devices have this revision or a higher one.
const REVISION_ID: u8 = 1;

/// The BAR and what lies where in it.
const BAR: u8 = 0;
const COMMON: u64 = 0x0000;
const COMMON_LEN: u64 = 0x40;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PBA: u64 = 0x7000;
const BAR_SIZE: u64 = 0x8000;
/// Length of the regions that have a page of their own.
const REGION_LEN: u64 = 0x1000;
/// Each queue has a doorbell of its own: ioeventfd tells queues apart by address.
const NOTIFY_OFF_MULTIPLIER: u64 = 4;

/// The most queues: their doorbells and, with one for the configuration, MSI-X vectors fit their regions.
const MAX_QUEUES: usize = 256;
const _: () = assert!(MAX_QUEUES as u64 * NOTIFY_OFF_MULTIPLIER <= REGION_LEN);
const _: () = assert!((MAX_QUEUES as u64 + 1) * TABLE_ENTRY <= MSIX_PBA - MSIX_TABLE);
const _: () = assert!((MAX_QUEUES as u64 / 64 + 1) * PBA_ENTRY <= BAR_SIZE - MSIX_PBA);

const CAP_ID_VENDOR: u8 = 0x09;
const VIRTIO_PCI_CAP_COMMON_CFG: u8 = 1;
const VIRTIO_PCI_CAP_NOTIFY_CFG: u8 = 2;
const VIRTIO_PCI_CAP_ISR_CFG: u8 = 3;
const VIRTIO_PCI_CAP_DEVICE_CFG: u8 = 4;
const VIRTIO_PCI_CAP_PCI_CFG: u8 = 5;
/// Offsets in the capability (`struct virtio_pci_cap`).
const CAP_BAR: usize = 4;
const CAP_OFFSET: usize = 8;
const CAP_LENGTH: usize = 12;
const CAP_PCI_CFG_DATA: usize = 16;

/// MSI-X Message Control lies behind id and next pointer.
const MSIX_CONTROL: usize = 2;
const VIRTIO_MSI_NO_VECTOR: u16 = 0xffff;

const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_DEVICE_NEEDS_RESET: u8 = 64;

const VIRTIO_F_INDIRECT_DESC: u64 = 1 << 28;
const VIRTIO_F_EVENT_IDX: u64 = 1 << 29;
const VIRTIO_F_VERSION_1: u64 = 1 << 32;
const TRANSPORT_FEATURES: u64 = VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX | VIRTIO_F_VERSION_1;

/// ISR status: a queue or the configuration wants attention. Only without MSI-X, but drivers read it.
const ISR_NONE: u8 = 0;

/// Registers of one queue, as the driver writes them before it enables it.
#[derive(Clone, Copy, Debug)]
struct QueueRegisters {
    size: u16,
    vector: u16,
    enabled: bool,
    desc: u64,
    driver: u64,
    device: u64,
}

/// What the driver's accesses change.
struct State {
    config: ConfigSpace,
    bars: Bars,
    msix: Msix,
    msix_at: usize,
    pci_cfg_at: usize,
    device: Box<dyn VirtioDevice>,
    status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    /// Whether the device has its queues.
    active: bool,
}

/// A virtio device as a PCI function.
pub struct VirtioPciFunction {
    state: Mutex<State>,
    /// One for each queue, for the life of the function.
    kicks: Vec<EventFd>,
    counters: Vec<Arc<QueueCounters>>,
    /// The configuration space of a function that nobody has touched.
    initial_config: ConfigSpace,
    /// Address of the BAR for which doorbells are registered.
    doorbells: Mutex<Option<u64>>,
    device_status: DeviceStatus,
    hypervisor: Arc<dyn Hypervisor>,
    mem: GuestMemory,
    name: &'static str,
}

/// What lies behind the BAR. The function owns the BAR, so this must not own the function.
struct Registers(Weak<VirtioPciFunction>);

impl VirtioPciFunction {
    /// Wraps a device.
    ///
    /// # Panics
    /// If the device has more than 256 queues: their number is the machine's choice, not the guest's.
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

    fn lock(&self) -> MutexGuard<'_, State> {
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

    /// A kick that reached user space: by the configuration window, or where KVM has no ioeventfd.
    fn ring_doorbell(&self, offset: u64) {
        let queue = usize::try_from(offset / NOTIFY_OFF_MULTIPLIER)
            .ok()
            .and_then(|index| self.kicks.get(index));
        if let Some(kick) = queue
            && let Err(error) = kick.write(1)
        {
            tracing::error!(%error, device = self.name, "cannot kick a queue");
        }
    }

    /// Common configuration as it reads now (Virtio 1.3, 4.1.4.3).
    fn read_common(&self, state: &State, offset: u64, data: &mut [u8]) {
        let offered = state.device.features() | TRANSPORT_FEATURES;
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let queue = state.queues.get(usize::from(state.queue_select));
        let broken = if self.device_status.needs_reset() {
            STATUS_DEVICE_NEEDS_RESET
        } else {
            0
        };
        let mut image = Vec::with_capacity(COMMON_LEN as usize);
        image.extend(state.device_feature_select.to_le_bytes());
        image.extend(half(offered, state.device_feature_select).to_le_bytes());
        image.extend(state.driver_feature_select.to_le_bytes());
        image.extend(half(state.driver_features, state.driver_feature_select).to_le_bytes());
        image.extend(state.config_vector.to_le_bytes());
        image.extend((state.queues.len() as u16).to_le_bytes());
        image.push(state.status | broken);
        image.push(self.device_status.generation());
        image.extend(state.queue_select.to_le_bytes());
        image.extend(queue.map_or(0, |q| q.size).to_le_bytes());
        image.extend(queue.map_or(0, |q| q.vector).to_le_bytes());
        image.extend(u16::from(queue.is_some_and(|q| q.enabled)).to_le_bytes());
        image.extend(queue.map_or(0, |_| state.queue_select).to_le_bytes());
        for address in [
            queue.map_or(0, |q| q.desc),
            queue.map_or(0, |q| q.driver),
            queue.map_or(0, |q| q.device),
        ] {
            image.extend(address.to_le_bytes());
        }
        let bytes = (offset as usize..).zip(data.iter_mut());
        for (at, byte) in bytes {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    fn write_common(&self, state: &mut State, offset: u64, data: &[u8]) {
        // Fields of 64 bits may be written in halves; all others only whole.
        match (offset, data) {
            (0x00, &[a, b, c, d]) => state.device_feature_select = u32::from_le_bytes([a, b, c, d]),
            (0x08, &[a, b, c, d]) => state.driver_feature_select = u32::from_le_bytes([a, b, c, d]),
            (0x0c, &[a, b, c, d]) => state.set_driver_features(u32::from_le_bytes([a, b, c, d])),
            (0x10, &[a, b]) => {
                let (index, vector) = state.vector(u16::from_le_bytes([a, b]));
                state.config_vector = index;
                self.device_status.set_config_vector(vector);
            }
            (0x14, &[status]) => self.set_status(state, status),
            (0x16, &[a, b]) => state.queue_select = u16::from_le_bytes([a, b]),
            (0x18, &[a, b]) => state.with_queue(|queue| queue.size = u16::from_le_bytes([a, b])),
            (0x1a, &[a, b]) => {
                let (index, _) = state.vector(u16::from_le_bytes([a, b]));
                state.with_queue(|queue| queue.vector = index);
            }
            (0x1c, &[1, 0]) => state.with_queue(|queue| queue.enabled = true),
            (0x20..0x38, &[a, b, c, d]) if offset.is_multiple_of(4) => {
                let value = u64::from(u32::from_le_bytes([a, b, c, d]));
                let shift = (offset % 8) * 8;
                state.set_address(offset, !(0xffff_ffff << shift), value << shift);
            }
            (0x20..0x38, &[a, b, c, d, e, f, g, h]) if offset.is_multiple_of(8) => {
                state.set_address(offset, 0, u64::from_le_bytes([a, b, c, d, e, f, g, h]));
            }
            _ => {}
        }
    }

    /// The driver wrote device_status (Virtio 1.3, 3.1.1).
    fn set_status(&self, state: &mut State, status: u8) {
        if status == 0 {
            return self.reset_device(state);
        }
        let added = status & !state.status;
        // Bits are only ever added; the device's own is not the driver's to set.
        state.status |= status & !STATUS_DEVICE_NEEDS_RESET;
        if added & STATUS_FEATURES_OK != 0 {
            let offered = state.device.features() | TRANSPORT_FEATURES;
            let features = state.driver_features;
            if features & !offered != 0 || features & VIRTIO_F_VERSION_1 == 0 {
                tracing::info!(
                    device = self.name,
                    features = format_args!("{features:#x}"),
                    "refused the driver's features"
                );
                state.status &= !STATUS_FEATURES_OK;
            }
        }
        if added & STATUS_DRIVER_OK != 0
            && !state.active
            && let Err(error) = self.activate(state)
        {
            tracing::warn!(
                device = self.name,
                error = %crate::error_line(&error),
                "the device does not start"
            );
            self.device_status.set_needs_reset();
        }
    }

    fn activate(&self, state: &mut State) -> Result<(), ActivateError> {
        let negotiated = state.status & STATUS_FEATURES_OK != 0;
        let maxima: Vec<u16> = state.device.queue_sizes().into();
        let mut queues = Vec::with_capacity(maxima.len());
        for (index, registers) in state.queues.iter().enumerate() {
            if !registers.enabled {
                queues.push(None);
                continue;
            }
            let index = index as u16;
            let not_ready = ActivateError::QueueNotReady(index);
            let max = maxima.get(usize::from(index)).copied().unwrap_or(0);
            let event_idx = state.driver_features & VIRTIO_F_EVENT_IDX != 0;
            let queue = match registers.build(max, event_idx, &self.mem) {
                Some(queue) if negotiated => queue,
                _ => return Err(not_ready),
            };
            let kick = self.kicks[usize::from(index)]
                .try_clone()
                .map_err(|source| ActivateError::Host {
                    device: self.name,
                    action: "duplicate a descriptor".into(),
                    source,
                })?;
            queues.push(Some(ActiveQueue {
                index,
                queue,
                kick,
                vector: state.msix.vector(registers.vector),
                counters: self.counters[usize::from(index)].clone(),
            }));
        }
        state.device.activate(Activation {
            mem: self.mem.clone(),
            features: state.driver_features,
            queues,
            status: self.device_status.clone(),
        })?;
        state.active = true;
        // What was kicked before the device listened must not be lost.
        for kick in &self.kicks {
            let _ = kick.write(1);
        }
        Ok(())
    }

    fn reset_device(&self, state: &mut State) {
        state.device.reset();
        state.active = false;
        state.status = 0;
        state.device_feature_select = 0;
        state.driver_feature_select = 0;
        state.driver_features = 0;
        state.config_vector = VIRTIO_MSI_NO_VECTOR;
        state.queue_select = 0;
        let sizes = state.device.queue_sizes().iter();
        state.queues = sizes.map(|&size| QueueRegisters::new(size)).collect();
        self.device_status.set_config_vector(None);
        self.device_status.clear();
        for kick in &self.kicks {
            // Empties the descriptor; it is not an error that there is nothing in it.
            let _ = kick.read();
        }
    }

    /// Applies what a write to configuration space means beyond the bytes themselves.
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

    /// What the configuration window stands for, if the access is to it (Virtio 1.3, 4.1.4.9).
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

fn capability(kind: u8, offset: u64, len: u64, more: &[u8]) -> Capability {
    let size = CAP_PCI_CFG_DATA + more.len();
    let mut body = vec![size as u8, kind, BAR, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((len as u32).to_le_bytes());
    body.extend(more);
    Capability {
        id: CAP_ID_VENDOR,
        body,
        writable: vec![],
    }
}

impl QueueRegisters {
    fn new(size: u16) -> Self {
        Self {
            size,
            vector: VIRTIO_MSI_NO_VECTOR,
            enabled: false,
            desc: 0,
            driver: 0,
            device: 0,
        }
    }

    /// The queue, if the driver set it up validly: a size that is a power of two and not above `max`,
    /// rings aligned and in RAM.
    fn build(&self, max: u16, event_idx: bool, mem: &GuestMemory) -> Option<Queue> {
        if !self.size.is_power_of_two() || self.size > max {
            return None;
        }
        let mut queue = Queue::new(max).ok()?;
        let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        queue.set_size(self.size);
        let (low, high) = halves(self.desc);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(self.driver);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(self.device);
        queue.set_used_ring_address(low, high);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        // The setters refuse misaligned addresses silently.
        let taken = (queue.desc_table(), queue.avail_ring(), queue.used_ring())
            == (self.desc, self.driver, self.device);
        (taken && queue.is_valid(mem)).then_some(queue)
    }
}

impl State {
    /// The number to read back and the vector for what the driver wrote.
    fn vector(&self, index: u16) -> (u16, Option<Arc<dyn crate::hypervisor::MsiVector>>) {
        match self.msix.vector(index) {
            Some(vector) => (index, Some(vector)),
            None => (VIRTIO_MSI_NO_VECTOR, None),
        }
    }

    /// Features are fixed once the driver has said FEATURES_OK.
    fn set_driver_features(&mut self, value: u32) {
        if self.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    /// Changes the selected queue, unless the device already has it.
    fn with_queue(&mut self, change: impl FnOnce(&mut QueueRegisters)) {
        if self.active {
            return;
        }
        if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) {
            change(queue);
        }
    }

    fn set_address(&mut self, offset: u64, keep: u64, value: u64) {
        self.with_queue(|queue| {
            let field = match offset {
                0x20..0x28 => &mut queue.desc,
                0x28..0x30 => &mut queue.driver,
                _ => &mut queue.device,
            };
            *field = *field & keep | value;
        });
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
    /// Called with the function's state locked: touches only what never changes.
    fn mapped(&self, address: Option<u64>) {
        let Some(function) = self.0.upgrade() else {
            return;
        };
        function.move_doorbells(address);
    }
}

impl VirtioPciFunction {
    /// Registers the doorbells at their new place. Without them the guest's kicks exit to user space and
    /// work all the same.
    fn move_doorbells(&self, address: Option<u64>) {
        let mut doorbells = self.doorbells.lock();
        for (index, kick) in self.kicks.iter().enumerate() {
            let offset = NOTIFY + index as u64 * NOTIFY_OFF_MULTIPLIER;
            if let Some(old) = *doorbells
                && let Err(error) = self.hypervisor.remove_doorbell(old + offset, kick)
            {
                tracing::error!(%error, device = self.name, "cannot remove a doorbell");
            }
            if let Some(new) = address
                && let Err(error) = self.hypervisor.add_doorbell(new + offset, kick)
            {
                tracing::warn!(%error, device = self.name, "cannot add a doorbell");
            }
        }
        *doorbells = address;
    }
}

impl Drop for VirtioPciFunction {
    fn drop(&mut self) {
        self.lock().device.reset();
    }
}

#[cfg(test)]
mod tests;
