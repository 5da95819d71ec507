//! Puts a machine together: KVM, RAM, buses and devices out of what [`Resources`] holds, with a kernel
//! loaded and vCPUs ready.
//!
//! A reset drops the machine and builds another: nothing of the old guest can be left over.

use std::{io, os::fd::OwnedFd, sync::Arc};

use fanlight_arch::{
    acpi::{self, AcpiConfig, AcpiError},
    boot::{self, BootSource, LoadError},
    cpuid::{CpuidError, guest_cpuid, physical_address_bits},
    layout,
    regs::InitialState,
    reset_vector,
};
use fanlight_devices::{
    GuestMemory,
    dma::SharedBlobDmaMap,
    hypervisor::{Hypervisor, MappedSlot},
    legacy::{
        RequestSink, i8042, i8042::I8042, power, power::PowerDevice, pvpanic::PvPanic, rtc,
        rtc::Rtc, serial, serial::SerialPort,
    },
    memory::{AddressSpace, AddressSpaceError, ArenaError, IoHandler, RamError},
    pci::{
        ConfigMechanism1, Ecam, EjectSink, FunctionContext, MECHANISM_1_PORTS, MsixError, PciError,
        Windows,
    },
    vfio::{DmaMapping, Iommu, VfioError},
    virtio::{
        VirtioDevice,
        block::Block,
        console::{Console, ConsoleHandle},
        gpu::Gpu,
        input::{Input, Kind},
        net::{Net, VhostNetError},
        rng::Rng,
        vsock::{Vsock, VsockError},
    },
};
use thiserror::Error;
use vm_memory::GuestMemoryError;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    host::memory_trim::shrink,
    host::resources::{Disk, Interface, Resources},
    kvm::{ClockState, ExitCounts, KvmError, KvmVcpu, KvmVm, VcpuError},
    vm::passthrough::PassedThrough,
    vm::pci_topology::{Inventory, InventoryError, NewDevice},
    vm::vcpus::{Shared, VcpuThreads},
};

/// PCI class codes (PCI Code and ID Assignment 1.11).
const CLASS_MASS_STORAGE_OTHER: u32 = 0x01_8000;
const CLASS_NETWORK_ETHERNET: u32 = 0x02_0000;
const CLASS_DISPLAY_OTHER: u32 = 0x03_8000;
const CLASS_COMMUNICATION_OTHER: u32 = 0x07_8000;
const CLASS_INPUT_KEYBOARD: u32 = 0x09_0000;
const CLASS_INPUT_MOUSE: u32 = 0x09_0200;
const CLASS_INPUT_OTHER: u32 = 0x09_8000;
const CLASS_OTHER: u32 = 0xff_0000;

/// Why there is no machine.
#[derive(Debug, Error)]
pub enum MachineError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The kernel, the initial RAM disk or the command line.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The socket device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// vhost-net.
    #[error("--net")]
    VhostNet(#[from] VhostNetError),
    /// A passed-through device.
    #[error("--vfio")]
    Vfio(#[from] VfioError),
    /// PCI.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// The window into the renderer's memory.
    #[error("--gpu hostmem")]
    HostMemory(#[from] ArenaError),
    /// Interrupts of a PCI function.
    #[error("cannot give a device its interrupts")]
    Msix(#[from] MsixError),
    /// Guest memory.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// Two things at one address: a mistake of Fanlight's.
    #[error("the machine's address map is wrong")]
    Map(#[from] AddressSpaceError),
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// CPUID.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// Guest memory could not be written.
    #[error("cannot write the first vCPU's tables")]
    Memory(#[from] GuestMemoryError),
    /// Something of the host's failed.
    #[error("cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl MachineError {
    /// Whether the user's configuration is at fault, rather than the host.
    pub fn is_bad_input(&self) -> bool {
        !matches!(
            self,
            MachineError::Map(_)
                | MachineError::Acpi(_)
                | MachineError::Cpuid(_)
                | MachineError::Memory(_)
                | MachineError::Host { .. }
                | MachineError::Msix(_)
                | MachineError::Vfio(VfioError::Host { .. } | VfioError::Msix(_))
                | MachineError::Kvm(KvmError::Ioctl { .. })
        )
    }
}

/// What the machine calls when the guest or a vCPU wants something.
#[derive(Clone)]
pub struct Callbacks {
    /// The guest asked for something.
    pub requests: RequestSink,
    /// A vCPU cannot go on.
    pub failures: Arc<dyn Fn(VcpuError) + Send + Sync>,
    /// The guest has given up the device of a slot that was asked for.
    pub ejected: EjectSink,
    /// The device of this name needs a reset by its driver.
    pub device_failed: Arc<dyn Fn(&str) + Send + Sync>,
}

/// A machine, running or about to.
///
/// Fields drop in order: vCPUs stop before devices go, devices before memory.
pub struct Machine {
    vcpus: Option<VcpuThreads>,
    ready: Vec<KvmVcpu>,
    /// The serial port, to give input to.
    pub serial: Arc<SerialPort>,
    /// Signalled when the serial port has room for input.
    pub serial_room: EventFd,
    /// The virtio console's handle and what is signalled when it has room for input.
    pub console: Option<(ConsoleHandle, EventFd)>,
    power: Arc<PowerDevice>,
    /// Exits to user space of each vCPU so far.
    pub exits: Vec<Arc<ExitCounts>>,
    /// Its PCI devices.
    pub inventory: Inventory,
    kvm: Arc<KvmVm>,
    /// Clocks, while the machine stands still.
    paused: Option<ClockState>,
    memory: Arc<AddressSpace>,
    ports: Arc<AddressSpace>,
    callbacks: Callbacks,
    /// Guest RAM in reach of passed-through devices, while there are any.
    dma: Vec<DmaMapping>,
    /// Blobs in their reach.
    reach: Arc<SharedBlobDmaMap>,
    _slots: Vec<MappedSlot>,
}

impl Machine {
    /// Builds a machine that has not started.
    pub fn build(resources: &Resources, callbacks: Callbacks) -> Result<Self, MachineError> {
        let config = &resources.config;
        let ram = &resources.ram;
        let kvm = Arc::new(KvmVm::new(config.cpus, kvm_device(resources)?)?);
        let host = |action| move |source| MachineError::Host { action, source };
        let (memory, ports) = (Arc::new(AddressSpace::new()), Arc::new(AddressSpace::new()));

        ram.insert_into(&memory)?;
        let slots = ram
            .slots()
            .map(|slot| kvm.map_slot(slot).map_err(host("show memory to the guest")))
            .collect::<Result<_, _>>()?;

        let event = || EventFd::new(EFD_NONBLOCK).map_err(host("make an event descriptor"));
        let line = |gsi| kvm.irq_line(gsi).map_err(host("connect an interrupt line"));
        let serial_room = event()?;
        let serial = Arc::new(SerialPort::new(
            line(layout::COM1_IRQ)?,
            Box::new(resources.serial.output.clone()),
            serial_room
                .try_clone()
                .map_err(host("duplicate a descriptor"))?,
        ));
        let requests = callbacks.requests.clone();
        let power = Arc::new(PowerDevice::new(line(layout::GED_IRQ)?, requests.clone()));
        let legacy: [(u16, u64, Arc<dyn IoHandler>); 5] = [
            (layout::COM1_PORT, serial::PORTS, serial.clone()),
            (layout::GED_PORT, power::PORTS, power.clone()),
            (layout::RTC_PORT, rtc::PORTS, Arc::new(Rtc::default())),
            (
                layout::I8042_PORT,
                i8042::PORTS,
                Arc::new(I8042::new(requests.clone())),
            ),
            (layout::PVPANIC_PORT, 1, Arc::new(PvPanic::new(requests))),
        ];
        for (port, count, device) in legacy {
            ports.insert_io(port.into(), count, device)?;
        }

        let mut inventory = Inventory::new(
            FunctionContext {
                hypervisor: kvm.clone(),
                mem: ram.memory().clone(),
                memory: memory.clone(),
                ports: ports.clone(),
            },
            callbacks.ejected.clone(),
            callbacks.device_failed.clone(),
        )?;
        if resources.graphics.is_some() && resources.passthrough.is_some() {
            inventory.make_switch()?;
        }
        let mut dma = Vec::new();
        let reach = Arc::<SharedBlobDmaMap>::default();
        if let Some(passthrough) = &resources.passthrough {
            kvm.honour_guest_pat()?;
            boot::populate_all(ram.memory());
            dma = passthrough.iommu.map_ram(ram.memory())?;
            reach.attach(passthrough.iommu.clone());
            for passed in &passthrough.devices {
                inventory.add_passed_through(passed)?;
            }
        }
        let console = add_devices(&mut inventory, resources, &reach)?;
        inventory.add_empty_ports(config.hotplug_ports.unwrap_or(0))?;
        let bus = inventory.bus();
        let cpuid = kvm.supported_cpuid()?;
        let mut address_bits = physical_address_bits(&cpuid);
        if let Some(passthrough) = &resources.passthrough {
            // Devices reach each other's BARs where the guest sees them.
            address_bits = address_bits.min(passthrough.iommu.address_bits()?);
        }
        let window = layout::pci_mmio64(ram.size(), address_bits);
        let pci_last_bus = bus.assign(&Windows {
            memory32: layout::PCI_MMIO32,
            memory64: window.clone(),
            io: layout::PCI_IO.start.into()..layout::PCI_IO.end.into(),
        })?;
        let ecam_len = layout::ECAM.end - layout::ECAM.start;
        memory.insert_io(
            layout::ECAM.start,
            ecam_len,
            Arc::new(Ecam(Arc::downgrade(&bus))),
        )?;
        ports.insert_io(
            layout::PCI_CONFIG_ADDRESS_PORT.into(),
            MECHANISM_1_PORTS,
            Arc::new(ConfigMechanism1::new(&bus)),
        )?;
        kvm.coalesce_port(layout::PCI_CONFIG_ADDRESS_PORT, 4)?;

        let acpi = AcpiConfig {
            cpus: config.cpus,
            pci_last_bus,
            pci_mmio64: window,
            serial: true,
        };
        let rsdp = acpi::write_tables(ram.memory(), &acpi)?;
        reset_vector::write(ram.memory())?;
        let state = load(resources, rsdp)?;
        let deadline = kvm.has_tsc_deadline();
        let ready = (0..config.cpus)
            .map(|id| {
                let vcpu = kvm.create_vcpu(id)?;
                let cpuid = guest_cpuid(&cpuid, id, config.cpus, deadline)?;
                vcpu.set_up(&cpuid, (id == 0).then_some(&state))?;
                Ok(vcpu)
            })
            .collect::<Result<_, MachineError>>()?;

        Ok(Self {
            vcpus: None,
            ready,
            serial,
            serial_room,
            console,
            power,
            exits: (0..config.cpus).map(|_| Arc::default()).collect(),
            inventory,
            kvm,
            paused: None,
            memory,
            ports,
            callbacks,
            dma,
            reach,
            _slots: slots,
        })
    }

    /// Starts the vCPUs.
    pub fn start(&mut self) -> Result<(), MachineError> {
        shrink();
        let shared = Shared {
            ports: self.ports.clone(),
            memory: self.memory.clone(),
            requests: self.callbacks.requests.clone(),
            failures: self.callbacks.failures.clone(),
            exits: self.exits.clone(),
        };
        let vcpus = VcpuThreads::start(std::mem::take(&mut self.ready), shared);
        self.vcpus = Some(vcpus.map_err(|source| MachineError::Host {
            action: "start a vCPU thread",
            source,
        })?);
        Ok(())
    }

    /// Exits to user space of all vCPUs so far.
    pub fn total_exits(&self) -> u64 {
        self.exits.iter().map(|exits| exits.total()).sum()
    }

    /// Stops the vCPUs and the guest's clocks. Does nothing to a machine that stands still.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        if let (Some(vcpus), None) = (&self.vcpus, self.paused) {
            vcpus.pause();
            match self.kvm.clock() {
                Ok(clock) => self.paused = Some(clock),
                Err(error) => {
                    vcpus.resume();
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    /// Lets the machine go on; its clocks go on from where they stood.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        if let (Some(vcpus), Some(clock)) = (&self.vcpus, self.paused) {
            // The time stamp counters first: the paravirtual clock is set in terms of them.
            vcpus.skip_cycles(clock.cycles_since());
            self.kvm.set_clock(&clock)?;
            self.paused = None;
            vcpus.resume();
        }
        Ok(())
    }

    /// Puts a device of the host's into the slot that it names, while the guest runs. The first one brings guest RAM
    /// into the devices' reach; what the guest has of it in small pages so far is moved into huge ones before.
    pub fn plug_passed_through(
        &mut self,
        passed: &PassedThrough,
        iommu: &Arc<Iommu>,
        mem: &GuestMemory,
    ) -> Result<(), InventoryError> {
        if self.dma.is_empty() {
            self.kvm.honour_guest_pat().map_err(MachineError::from)?;
            boot::populate_all(mem);
            self.dma = iommu.map_ram(mem).map_err(MachineError::from)?;
            self.reach.attach(iommu.clone());
        }
        self.inventory.plug_passed_through(passed)
    }

    /// The last passed-through device goes, and with it the address space that guest RAM is mapped in.
    pub fn end_dma(&mut self) {
        self.reach.detach();
        self.dma.clear();
    }

    /// Raises a non-maskable interrupt at each vCPU.
    pub fn raise_nmi(&self) -> Result<(), MachineError> {
        (0..)
            .zip(&self.exits)
            .try_for_each(|(id, _)| self.kvm.raise_nmi(id))
            .map_err(MachineError::from)
    }

    /// Presses the power button: a guest that listens shuts down.
    pub fn press_power_button(&self) -> io::Result<()> {
        self.power.press_power_button()
    }
}

/// The hypervisor's descriptor, if it was given open.
fn kvm_device(resources: &Resources) -> Result<Option<OwnedFd>, MachineError> {
    let device = resources.kvm.as_ref().map(OwnedFd::try_clone);
    device.transpose().map_err(|source| MachineError::Host {
        action: "duplicate a descriptor",
        source,
    })
}

/// A disk's device.
pub fn block_device(disk: &Disk, cpus: u32) -> NewDevice {
    NewDevice {
        id: disk.id.clone(),
        device: Box::new(Block::new(disk.image.clone(), disk.serial.clone(), cpus)),
        class: CLASS_MASS_STORAGE_OTHER,
        port: disk.port,
    }
}

/// A network interface's device.
pub fn net_device(interface: &Interface, mem: &GuestMemory) -> Result<NewDevice, MachineError> {
    let net = Net::new(interface.tap.clone(), interface.mac, interface.vhost, mem)?;
    Ok(NewDevice {
        id: interface.id.clone(),
        device: Box::new(net),
        class: CLASS_NETWORK_ETHERNET,
        port: interface.port,
    })
}

/// Loads the kernel into clean memory; the first vCPU's state.
fn load(resources: &Resources, rsdp: u64) -> Result<InitialState, MachineError> {
    let config = &resources.config;
    let again = |(path, file): &(std::path::PathBuf, std::fs::File)| {
        use std::io::Seek;
        let mut file = file.try_clone()?;
        file.rewind()?;
        Ok((path.clone(), file))
    };
    let reopen = |source| MachineError::Host {
        action: "read the kernel again",
        source,
    };
    let (kernel_path, kernel) = again(&resources.kernel).map_err(reopen)?;
    let initrd = resources.initrd.as_ref().map(again);
    let mem = resources.ram.memory();
    let entry = boot::load(
        mem,
        BootSource {
            kernel_path,
            kernel,
            initrd: initrd.transpose().map_err(reopen)?,
            cmdline: config.cmdline.clone(),
            guest_unpacks: config.unpack == fanlight_api::KernelUnpack::Guest,
            rsdp,
        },
    )?;
    Ok(InitialState::prepare(mem, entry)?)
}

/// One entry for each kind of device: adding one is adding it here.
fn add_devices(
    inventory: &mut Inventory,
    resources: &Resources,
    reach: &Arc<SharedBlobDmaMap>,
) -> Result<Option<(ConsoleHandle, EventFd)>, MachineError> {
    let config = &resources.config;
    let mem = resources.ram.memory();
    for disk in &resources.disks {
        inventory.add(block_device(disk, config.cpus))?;
    }
    for interface in &resources.interfaces {
        inventory.add(net_device(interface, mem)?)?;
    }
    let map = inventory.address_space();
    let hypervisor = inventory.hypervisor();
    let add = |inventory: &mut Inventory, id: &str, device: Box<dyn VirtioDevice>, class| {
        inventory.add(NewDevice {
            id: id.into(),
            device,
            class,
            port: None,
        })
    };
    let host = |action| move |source| MachineError::Host { action, source };
    if let (Some(config), Some(file)) = (&config.vsock, &resources.vsock) {
        let file = file.try_clone().map_err(host("duplicate a descriptor"))?;
        let vsock = Vsock::new(config.cid, file, mem)?;
        add(
            inventory,
            "vsock",
            Box::new(vsock),
            CLASS_COMMUNICATION_OTHER,
        )?;
    }
    if config.rng.enabled {
        add(inventory, "rng", Box::<Rng>::default(), CLASS_OTHER)?;
    }
    if let Some(graphics) = &resources.graphics {
        for (number, host) in graphics.gpus.iter().enumerate() {
            let mut gpu = Gpu::new(host.display.clone(), map.clone());
            if let Some(renderer) = &host.renderer {
                gpu = gpu.with_renderer(renderer.rendering(hypervisor.clone(), reach.clone())?);
            }
            inventory.add_together(NewDevice {
                id: format!("gpu{number}"),
                device: Box::new(gpu),
                class: CLASS_DISPLAY_OTHER,
                port: host.port,
            })?;
        }
        for handle in &graphics.inputs {
            let (id, class) = match handle.kind() {
                Kind::Keyboard => ("keyboard", CLASS_INPUT_KEYBOARD),
                Kind::Pointer => ("pointer", CLASS_INPUT_MOUSE),
                Kind::Touch => ("touch", CLASS_INPUT_OTHER),
            };
            add(inventory, id, Box::new(Input::new(handle)), class)?;
        }
    }
    let Some(console) = &resources.console else {
        return Ok(None);
    };
    let room = EventFd::new(EFD_NONBLOCK).map_err(host("make an event descriptor"))?;
    let signal = room.try_clone().map_err(host("duplicate a descriptor"))?;
    let (device, handle) =
        Console::new(console.output.clone(), signal).map_err(host("make an event descriptor"))?;
    add(
        inventory,
        "console",
        Box::new(device),
        CLASS_COMMUNICATION_OTHER,
    )?;
    Ok(Some((handle, room)))
}
