//! Prepares the guest's start: addresses of PCI devices, firmware tables, the kernel, and vCPUs.

use std::{
    fs::File,
    io::{self, Seek},
    path::PathBuf,
    sync::Arc,
};

use fanlight_api::KernelUnpack;
use fanlight_arch::{
    acpi::{self, AcpiConfig},
    boot::{self, BootSource},
    cpuid::{guest_cpuid, physical_address_bits},
    layout,
    regs::InitialState,
    reset_vector,
};
use fanlight_devices::pci::{
    ConfigMechanism1, Ecam, FunctionContext, MECHANISM_1_PORTS, PciBus, Windows,
};
use kvm_bindings::CpuId;

use crate::{
    kvm::{KvmVcpu, KvmVm},
    vm::{error::MachineError, resources::Resources},
};

/// Gives PCI devices their addresses, and writes tables and kernel into clean memory. Returns vCPUs that are ready to
/// start.
pub fn prepare(
    resources: &Resources,
    kvm: &KvmVm,
    context: &FunctionContext,
    bus: &Arc<PciBus>,
) -> Result<Vec<KvmVcpu>, MachineError> {
    let (config, mem) = (resources.config(), resources.ram.memory());
    let cpuid = kvm.supported_cpuid()?;
    let mut address_bits = physical_address_bits(&cpuid);
    if let Some(iommu) = resources.hotplug.devices.iommu() {
        // Peer-to-peer DMA uses the guest's BAR addresses, so that the IOMMU must be able to map them.
        address_bits = address_bits.min(iommu.address_bits()?);
    }
    let mmio64 = layout::pci_mmio64(resources.ram.size(), address_bits);
    let last_bus = bus.assign(&Windows {
        memory32: layout::PCI_MMIO32,
        memory64: mmio64.clone(),
        io: layout::PCI_IO.start.into()..layout::PCI_IO.end.into(),
    })?;
    show_config_space(bus, context)?;
    kvm.coalesce_port(layout::PCI_CONFIG_ADDRESS_PORT, 4)?;
    let acpi = AcpiConfig {
        cpus: config.cpus,
        pci_last_bus: last_bus,
        pci_mmio64: mmio64,
        serial: true,
    };
    let rsdp = acpi::write_tables(mem, &acpi)?;
    reset_vector::write(mem)?;
    let state = load_kernel(resources, rsdp)?;
    create_vcpus(kvm, config.cpus, &cpuid, &state)
}

/// Maps both interfaces of PCI configuration space: ECAM, and the ports of configuration mechanism 1.
fn show_config_space(bus: &Arc<PciBus>, context: &FunctionContext) -> Result<(), MachineError> {
    context.memory.insert_io(
        layout::ECAM.start,
        layout::ECAM.end - layout::ECAM.start,
        Arc::new(Ecam(Arc::downgrade(bus))),
    )?;
    context.ports.insert_io(
        layout::PCI_CONFIG_ADDRESS_PORT.into(),
        MECHANISM_1_PORTS,
        Arc::new(ConfigMechanism1::new(bus)),
    )?;
    Ok(())
}

/// Loads the kernel. Returns the initial state of the first vCPU.
fn load_kernel(resources: &Resources, rsdp: u64) -> Result<InitialState, MachineError> {
    let (config, mem) = (resources.config(), resources.ram.memory());
    let read_again = MachineError::host("read the kernel again");
    let (kernel_path, kernel) = from_start(&resources.boot.kernel).map_err(read_again)?;
    let initrd = resources.boot.initrd.as_ref().map(from_start);
    let source = BootSource {
        kernel_path,
        kernel,
        initrd: initrd.transpose().map_err(read_again)?,
        cmdline: config.cmdline.clone(),
        guest_unpacks: config.unpack == KernelUnpack::Guest,
        rsdp,
    };
    let entry = boot::load(mem, source)?;
    Ok(InitialState::prepare(mem, entry)?)
}

/// A duplicate of the file, rewound.
fn from_start((path, file): &(PathBuf, File)) -> io::Result<(PathBuf, File)> {
    let mut file = file.try_clone()?;
    file.rewind()?;
    Ok((path.clone(), file))
}

fn create_vcpus(
    kvm: &KvmVm,
    count: u32,
    cpuid: &CpuId,
    state: &InitialState,
) -> Result<Vec<KvmVcpu>, MachineError> {
    let deadline = kvm.has_tsc_deadline();
    let create = |id| {
        let vcpu = kvm.create_vcpu(id)?;
        let cpuid = guest_cpuid(cpuid, id, count, deadline)?;
        vcpu.set_up(&cpuid, (id == 0).then_some(state))?;
        Ok(vcpu)
    };
    (0..count).map(create).collect()
}
