//! Builds a machine from [`Resources`]: KVM, RAM, buses, devices, a loaded kernel and vCPUs.
//!
//! A reset drops the machine and builds another, so that no state of the old guest survives.

use std::{io, sync::Arc};

use fanlight_arch::boot::populate_all;
use fanlight_devices::{
    dma::SharedBlobDmaMap,
    hypervisor::{Hypervisor, MappedSlot},
    legacy::RequestSink,
    memory::{AddressSpace, GuestRam},
    pci::{EjectSink, FunctionContext},
    vfio::{DmaMapping, Iommu},
};

use crate::{
    host::memory_trim,
    kvm::KvmVm,
    vm::{
        boot,
        devices::{Device, Life, of_device},
        error::MachineError,
        guest_console::GuestConsole,
        pci_topology::{FailureSink, NewDevice, PciTopology},
        platform::Platform,
        processors::Processors,
        resources::Resources,
        vcpus::{Shared, VcpuFailureSink},
    },
};

/// Callbacks of the machine for events of the guest and of vCPUs.
#[derive(Clone)]
pub struct Callbacks {
    /// The guest asked for something.
    pub requests: RequestSink,
    /// A vCPU cannot go on.
    pub failures: VcpuFailureSink,
    /// The guest has released the device of a slot.
    pub ejected: EjectSink,
    /// The device of this name needs a reset by its driver.
    pub device_failed: FailureSink,
}

/// A machine that runs or is about to.
///
/// Fields drop in order: vCPUs stop before devices go, devices before memory.
pub struct Machine {
    /// Its vCPUs.
    pub processors: Processors,
    platform: Platform,
    /// Its consoles: the serial port, then the virtio console if there is one.
    pub consoles: Vec<GuestConsole>,
    /// Its PCI devices.
    pub topology: PciTopology,
    cpus: u32,
    kvm: Arc<KvmVm>,
    context: FunctionContext,
    dma: Dma,
    _ram_slots: Vec<MappedSlot>,
}

/// What passed-through devices reach by DMA.
#[derive(Default)]
struct Dma {
    /// Guest RAM, while there are such devices.
    ram: Vec<DmaMapping>,
    /// Blobs.
    blobs: Arc<SharedBlobDmaMap>,
    /// The number of the next passed-through function.
    next_function: u32,
}

impl Machine {
    /// Builds a machine that has not started.
    pub fn build(resources: &Resources, callbacks: Callbacks) -> Result<Self, MachineError> {
        let (config, ram) = (resources.config(), &resources.ram);
        let kvm = Arc::new(KvmVm::new(config.cpus, resources.open_kvm()?)?);
        let context = FunctionContext {
            hypervisor: kvm.clone(),
            mem: ram.memory().clone(),
            memory: Arc::new(AddressSpace::new()),
            ports: Arc::new(AddressSpace::new()),
        };
        let ram_slots = show_ram(ram, &kvm, &context.memory)?;
        let (platform, serial) = Platform::new(
            &*kvm,
            &context.ports,
            resources.consoles.serial.output.clone(),
            callbacks.requests.clone(),
        )?;
        let shared = Shared {
            ports: context.ports.clone(),
            memory: context.memory.clone(),
            requests: callbacks.requests,
            failures: callbacks.failures,
        };
        let topology = PciTopology::new(kvm.clone(), callbacks.ejected, callbacks.device_failed)?;
        let mut machine = Self {
            processors: Processors::new(kvm.clone(), shared),
            platform,
            consoles: vec![serial],
            topology,
            cpus: config.cpus,
            kvm,
            context,
            dma: Dma::default(),
            _ram_slots: ram_slots,
        };
        machine.add_devices(resources)?;
        let bus = machine.topology.bus();
        let vcpus = boot::prepare(resources, &machine.kvm, &machine.context, &bus)?;
        machine.processors.add(vcpus);
        Ok(machine)
    }

    /// Adds the devices of the configuration, and empty ports for hot-plug.
    fn add_devices(&mut self, resources: &Resources) -> Result<(), MachineError> {
        let devices = &resources.hotplug.devices;
        if devices.need_switch() {
            self.topology.make_switch()?;
        }
        if let Some(iommu) = devices.iommu() {
            self.begin_dma(iommu)?;
        }
        for device in devices.iter() {
            let new = self.new_device(device)?;
            self.topology.add(new)?;
        }
        let ports = resources.config().hotplug_ports.unwrap_or(0);
        Ok(self.topology.add_empty_ports(ports)?)
    }

    fn new_device(&mut self, device: &dyn Device) -> Result<NewDevice, MachineError> {
        let mut life = Life {
            cpus: self.cpus,
            context: &self.context,
            shared_blobs: &self.dma.blobs,
            consoles: &mut self.consoles,
            next_function: &mut self.dma.next_function,
        };
        let function = device.build(&mut life).map_err(of_device(device))?;
        Ok(NewDevice {
            id: device.id().to_owned(),
            function,
            port: device.port(),
            in_switch: device.shares_memory(),
        })
    }

    /// Plugs a device into the slot that it names, while the guest runs. The first passed-through device has guest RAM
    /// mapped for DMA.
    pub fn plug(&mut self, device: &dyn Device) -> Result<(), MachineError> {
        if let (Some(iommu), true) = (device.iommu(), self.dma.ram.is_empty()) {
            self.begin_dma(iommu)?;
        }
        let new = self.new_device(device)?;
        Ok(self.topology.plug(new)?)
    }

    /// Maps guest RAM for DMA of passed-through devices. Before that, RAM is populated in huge pages.
    fn begin_dma(&mut self, iommu: &Arc<Iommu>) -> Result<(), MachineError> {
        self.kvm.honour_guest_pat()?;
        populate_all(&self.context.mem);
        self.dma.ram = iommu.map_ram(&self.context.mem)?;
        self.dma.blobs.attach(iommu.clone());
        Ok(())
    }

    /// Unmaps all memory for DMA. Call it before the last passed-through device is closed, which closes the IOAS.
    pub fn end_dma(&mut self) {
        self.dma.blobs.detach();
        self.dma.ram.clear();
    }

    /// Starts the vCPUs.
    pub fn start(&mut self) -> Result<(), MachineError> {
        memory_trim::drop_startup_pages();
        self.processors.start()
    }

    /// Presses the power button. A guest that handles it shuts down.
    pub fn press_power_button(&self) -> io::Result<()> {
        self.platform.press_power_button()
    }
}

/// Puts guest RAM into the address map and into KVM memory slots.
fn show_ram(
    ram: &GuestRam,
    kvm: &KvmVm,
    memory: &AddressSpace,
) -> Result<Vec<MappedSlot>, MachineError> {
    ram.insert_into(memory)?;
    let show = |slot| {
        let slot = kvm.map_slot(slot);
        slot.map_err(MachineError::host("show memory to the guest"))
    };
    ram.slots().map(show).collect()
}
