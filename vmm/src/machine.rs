//! Puts a machine together: KVM, RAM, buses and devices out of what [`Resources`] holds, with a kernel
//! loaded and vCPUs ready.
//!
//! A reset drops the machine and builds another: nothing of the old guest can be left over.

use std::{collections::BTreeMap, io, sync::Arc};

use fanlight_arch::{
    acpi::{self, AcpiConfig, AcpiError},
    boot::{self, BootSource, LoadError},
    cpuid::{CpuidError, guest_cpuid, physical_address_bits},
    layout,
    regs::InitialState,
    reset_vector,
};
use fanlight_devices::{
    hypervisor::{Hypervisor, MappedSlot},
    legacy::{
        RequestSink, i8042, i8042::I8042, power, power::PowerDevice, pvpanic::PvPanic, rtc,
        rtc::Rtc, serial, serial::SerialPort,
    },
    memory::{AddressSpace, AddressSpaceError, IoHandler, RamError},
    pci::{
        ConfigMechanism1, DevFn, Ecam, HostBridge, MECHANISM_1_PORTS, MsixError, PciBus, PciError,
        PciFunction, RootPort, Windows,
    },
    vfio::{DmaMapping, VfioError, VfioFunction},
    virtio::{
        VirtioDevice,
        block::Block,
        console::{Console, ConsoleHandle},
        net::{Net, VhostNetError},
        pci::{Environment, VirtioPciFunction},
        rng::Rng,
        vsock::{Vsock, VsockError},
    },
};
use thiserror::Error;
use vm_memory::GuestMemoryError;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    kvm::{ExitCounts, KvmError, KvmVcpu, KvmVm, VcpuError},
    passthrough::Passthrough,
    resources::Resources,
    vcpus::{Shared, VcpuThreads},
};

/// PCI class codes (PCI Code and ID Assignment 1.11).
const CLASS_MASS_STORAGE_OTHER: u32 = 0x01_8000;
const CLASS_NETWORK_ETHERNET: u32 = 0x02_0000;
const CLASS_COMMUNICATION_OTHER: u32 = 0x07_8000;
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
    /// Exits to user space so far.
    pub exits: Arc<ExitCounts>,
    memory: Arc<AddressSpace>,
    ports: Arc<AddressSpace>,
    callbacks: Callbacks,
    _bus: Arc<PciBus>,
    _dma: Vec<DmaMapping>,
    _slots: Vec<MappedSlot>,
}

/// Functions on the root bus and behind ports, as they are added.
struct Topology {
    bus: Arc<PciBus>,
    ports: BTreeMap<u8, (DevFn, Arc<RootPort>)>,
    environment: Environment,
}

impl Topology {
    fn new(environment: Environment) -> Result<Self, MachineError> {
        let bus = Arc::new(PciBus::default());
        bus.add(Arc::new(HostBridge::default()))?;
        Ok(Self {
            bus,
            ports: BTreeMap::new(),
            environment,
        })
    }

    fn add(
        &mut self,
        device: Box<dyn VirtioDevice>,
        class: u32,
        port: Option<u8>,
    ) -> Result<(), MachineError> {
        let function = VirtioPciFunction::new(device, class, &self.environment)?;
        self.add_function(function, port).map(drop)
    }

    /// Puts a function in its place: device numbers on the root bus, of the function or its port, and
    /// behind the port.
    fn add_function(
        &mut self,
        function: Arc<dyn PciFunction>,
        port: Option<u8>,
    ) -> Result<(u8, u8), MachineError> {
        match port {
            None => Ok((self.bus.add(function)?.device(), 0)),
            Some(number) => {
                let (place, port) = self.port(number)?;
                Ok((place.device(), port.bus.add(function)?.device()))
            }
        }
    }

    /// The port of this number, which is made when it is first named.
    fn port(&mut self, number: u8) -> Result<(DevFn, Arc<RootPort>), MachineError> {
        if let Some(port) = self.ports.get(&number) {
            return Ok(port.clone());
        }
        let port = Arc::new(RootPort::new(number));
        let place = self.bus.add_port(port.clone())?;
        self.ports.insert(number, (place, port.clone()));
        Ok((place, port))
    }
}

impl Machine {
    /// Builds a machine that has not started.
    pub fn build(resources: &Resources, callbacks: Callbacks) -> Result<Self, MachineError> {
        let config = &resources.config;
        let ram = &resources.ram;
        let kvm = Arc::new(KvmVm::new(config.cpus)?);
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

        let mut topology = Topology::new(Environment {
            hypervisor: kvm.clone(),
            mem: ram.memory().clone(),
            memory: memory.clone(),
            ports: ports.clone(),
        })?;
        let mut dma = Vec::new();
        if let Some(passthrough) = &resources.passthrough {
            kvm.honour_guest_pat()?;
            dma = passthrough.iommu.map_ram(ram.memory())?;
            add_passed_through(&mut topology, passthrough)?;
        }
        let console = add_devices(&mut topology, resources)?;
        let bus = topology.bus;
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
            exits: Arc::default(),
            memory,
            ports,
            callbacks,
            _bus: bus,
            _dma: dma,
            _slots: slots,
        })
    }

    /// Starts the vCPUs.
    pub fn start(&mut self) -> Result<(), MachineError> {
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

    /// Presses the power button: a guest that listens shuts down.
    pub fn press_power_button(&self) -> io::Result<()> {
        self.power.press_power_button()
    }
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

fn add_passed_through(
    topology: &mut Topology,
    passthrough: &Passthrough,
) -> Result<(), MachineError> {
    for (passed, number) in passthrough.devices.iter().zip(0..) {
        let function = VfioFunction::new(passed.device.clone(), number, &topology.environment)?;
        let (device, rotated) = topology.add_function(function.clone(), passed.port)?;
        if let Some(pin) = function.interrupt_pin() {
            let gsi = layout::pci_irq(device, (pin + rotated) % 4);
            function.connect_pin(&*topology.environment.hypervisor, gsi);
        }
    }
    Ok(())
}

/// One entry for each kind of device: adding one is adding it here.
fn add_devices(
    topology: &mut Topology,
    resources: &Resources,
) -> Result<Option<(ConsoleHandle, EventFd)>, MachineError> {
    let config = &resources.config;
    let mem = resources.ram.memory();
    for disk in &resources.disks {
        let block = Block::new(disk.image.clone(), disk.serial.clone(), config.cpus);
        topology.add(Box::new(block), CLASS_MASS_STORAGE_OTHER, disk.port)?;
    }
    for interface in &resources.interfaces {
        let net = Net::new(interface.tap.clone(), interface.mac, interface.vhost, mem)?;
        topology.add(Box::new(net), CLASS_NETWORK_ETHERNET, interface.port)?;
    }
    if let Some(vsock) = &config.vsock {
        let vsock = Vsock::new(vsock.cid, mem)?;
        topology.add(Box::new(vsock), CLASS_COMMUNICATION_OTHER, None)?;
    }
    if config.rng.enabled {
        topology.add(Box::new(Rng::default()), CLASS_OTHER, None)?;
    }
    let Some(console) = &resources.console else {
        return Ok(None);
    };
    let host = |source| MachineError::Host {
        action: "make an event descriptor",
        source,
    };
    let room = EventFd::new(EFD_NONBLOCK).map_err(host)?;
    let (device, handle) =
        Console::new(console.output.clone(), room.try_clone().map_err(host)?).map_err(host)?;
    topology.add(Box::new(device), CLASS_COMMUNICATION_OTHER, None)?;
    Ok(Some((handle, room)))
}
