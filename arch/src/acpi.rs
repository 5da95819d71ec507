//! ACPI tables of the machine: hardware-reduced, so that a guest looks for none of a PC's timers and
//! fixed registers (ACPI 6.5, 4.1).

use std::ops::Range;

use acpi_tables::{
    Aml, AmlSink,
    aml::{
        AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else,
        Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If,
        Interrupt, Local, Memory32Fixed, Method, Name, Notify, ONE, OpRegion, OpRegionSpace, Or,
        Package, PackageBuilder, Path, ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
    },
    fadt::{FADTBuilder, Flags, PmProfile},
    gas::{AccessSize, AddressSpace as GasSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    mcfg::MCFG,
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::{GuestMemory, layout};

const OEM_ID: [u8; 6] = *b"FANLGT";
const OEM_TABLE_ID: [u8; 8] = *b"FANLIGHT";
const OEM_REVISION: u32 = 1;

/// DSDT revision from which AML integers have 64 bits.
const DSDT_REVISION: u8 = 6;
/// FADT IAPC_BOOT_ARCH: no VGA to probe. The bit for an 8042 stays clear: there is no keyboard to wait
/// for.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
/// PCI Express control that the guest may take (PCI Firmware 3.3, 4.5.1): native hot-plug, PME, and the
/// capability structure. Not SHPC hot-plug, and not AER: nothing reports errors.
const OSC_GRANTED: u32 = 1 << 0 | 1 << 2 | 1 << 4;

/// `_OSC` of a PCI host bridge (PCI Firmware 3.3, 4.5.1).
const OSC_UUID: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
/// Status that `_OSC` returns for another interface (ACPI 6.5, 6.2.11).
const OSC_UNKNOWN_UUID: u8 = 1 << 2;

/// What the tables describe.
#[derive(Clone, Debug)]
pub struct AcpiConfig {
    /// Number of vCPUs; APIC ids count from 0.
    pub cpus: u32,
    /// Last PCI bus. Linux asks for every device of every bus up to here: 32 accesses a bus.
    pub pci_last_bus: u8,
    /// 64-bit prefetchable window for BARs; may be empty.
    pub pci_mmio64: Range<u64>,
    /// Whether the first serial port is there.
    pub serial: bool,
}

/// Why the tables could not be placed.
#[derive(Debug, Error)]
pub enum AcpiError {
    /// They outgrow their area.
    #[error("the ACPI tables need more than {:#x} bytes", layout::ACPI_TABLES.end - layout::ACPI_TABLES.start)]
    TooLarge,
    /// RAM does not reach that far.
    #[error("cannot write the ACPI tables to guest memory")]
    Write(#[from] GuestMemoryError),
}

/// Writes the tables and returns the address of the RSDP.
pub fn write_tables(mem: &GuestMemory, config: &AcpiConfig) -> Result<u64, AcpiError> {
    let rsdp_at = layout::ACPI_TABLES.start;
    let mut at = rsdp_at + Rsdp::len() as u64;
    let mut place = |bytes: &[u8]| -> Result<u64, AcpiError> {
        let start = at.next_multiple_of(16);
        let end = start + bytes.len() as u64;
        if end > layout::ACPI_TABLES.end {
            return Err(AcpiError::TooLarge);
        }
        mem.write_slice(bytes, GuestAddress(start))?;
        at = end;
        Ok(start)
    };
    let dsdt_at = place(dsdt(config).as_slice())?;
    let tables = [
        place(&bytes(&fadt(dsdt_at)))?,
        place(&bytes(&madt(config.cpus)))?,
        place(&bytes(&mcfg(config.pci_last_bus)))?,
    ];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in tables {
        xsdt.add_entry(table);
    }
    let xsdt_at = place(&bytes(&xsdt))?;
    mem.write_slice(&bytes(&Rsdp::new(OEM_ID, xsdt_at)), GuestAddress(rsdp_at))?;
    Ok(rsdp_at)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port_register(port: u16) -> GAS {
    GAS::new(
        GasSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(port),
    )
}

fn fadt(dsdt_at: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt_at)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCH_NO_VGA.into();
    fadt.reset_reg = port_register(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port_register(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port_register(layout::SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(cpus: u32) -> MADT {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(layout::LOCAL_APIC as u32),
    );
    for cpu in 0..cpus.min(layout::MAX_CPUS) as u8 {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC as u32, 0));
    madt
}

fn mcfg(last_bus: u8) -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM.start, 0, 0, last_bus);
    mcfg
}

fn dsdt(config: &AcpiConfig) -> Sdt {
    let mut dsdt = Sdt::new(
        *b"DSDT",
        36,
        DSDT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    pci_host_bridge(&mut dsdt, config);
    power(&mut dsdt);
    legacy(&mut dsdt, config);
    dsdt
}

fn pci_host_bridge(dsdt: &mut Sdt, config: &AcpiConfig) {
    let buses = AddressSpace::new_bus_number(0u16, u16::from(config.pci_last_bus));
    let config_ports = IO::new(
        layout::PCI_CONFIG_ADDRESS_PORT,
        layout::PCI_CONFIG_ADDRESS_PORT,
        1,
        8,
    );
    let ports = AddressSpace::new_io(layout::PCI_IO.start, layout::PCI_IO.end, None);
    let mmio32 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_MMIO32.start as u32,
        (layout::PCI_MMIO32.end - 1) as u32,
        None,
    );
    let mmio64 = (!config.pci_mmio64.is_empty()).then(|| {
        AddressSpace::new_memory(
            AddressSpaceCacheable::PreFetchable,
            true,
            config.pci_mmio64.start,
            config.pci_mmio64.end - 1,
            None,
        )
    });
    let mut windows: Vec<&dyn Aml> = vec![&buses, &config_ports, &ports, &mmio32];
    if let Some(mmio64) = &mmio64 {
        windows.push(mmio64);
    }
    // _OSC takes (UUID, revision, count, buffer of capability dwords) and gives the buffer back with
    // the third dword, control, reduced to what is granted.
    Scope::new(
        "\\_SB_".into(),
        vec![
            &Device::new(
                "PCI0".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                    &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                    &Name::new("_SEG".into(), &ZERO),
                    &Name::new("_UID".into(), &ZERO),
                    &Name::new("_CCA".into(), &ONE),
                    &Name::new("_CRS".into(), &ResourceTemplate::new(windows)),
                    &Name::new("_PRT".into(), &InterruptRouting),
                    &Method::new(
                        "_OSC".into(),
                        4,
                        true,
                        vec![
                            &If::new(
                                &Equal::new(&Arg(0), &Uuid::new(OSC_UUID)),
                                vec![
                                    &CreateDWordField::new(&Path::new("CTRL"), &Arg(3), &8u8),
                                    &And::new(&Path::new("CTRL"), &Path::new("CTRL"), &OSC_GRANTED),
                                ],
                            ),
                            &Else::new(vec![
                                &CreateDWordField::new(&Path::new("STAT"), &Arg(3), &ZERO),
                                &Or::new(&Path::new("STAT"), &Path::new("STAT"), &OSC_UNKNOWN_UUID),
                            ]),
                            &Return::new(&Arg(3)),
                        ],
                    ),
                ],
            ),
            &Device::new(
                "ECAM".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                    &Name::new("_UID".into(), &ZERO),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![&Memory32Fixed::new(
                            true,
                            layout::ECAM.start as u32,
                            (layout::ECAM.end - layout::ECAM.start) as u32,
                        )]),
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(dsdt);
}

/// `_PRT`: which line each pin of each device on the root bus raises (ACPI 6.5, 6.2.13).
struct InterruptRouting;

impl Aml for InterruptRouting {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        /// Any function of the device.
        const ANY_FUNCTION: u32 = 0xffff;
        let mut routes = PackageBuilder::new();
        for device in 0..32u8 {
            for pin in 0..4u8 {
                let address = u32::from(device) << 16 | ANY_FUNCTION;
                let line = layout::pci_irq(device, pin);
                routes.add_element(&Package::new(vec![&address, &pin, &ZERO, &line]));
            }
        }
        routes.to_aml_bytes(sink);
    }
}

/// Soft off, and the power button behind a generic event device (ACPI 6.5, 5.6.9).
fn power(dsdt: &mut Sdt) {
    Name::new(
        "\\_S5_".into(),
        &Package::new(vec![&layout::SLEEP_TYPE_S5, &layout::SLEEP_TYPE_S5]),
    )
    .to_aml_bytes(dsdt);
    Scope::new(
        "\\_SB_".into(),
        vec![
            &Device::new(
                "PWRB".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
                    &Name::new("_UID".into(), &ZERO),
                ],
            ),
            &Device::new(
                "GED_".into(),
                vec![
                    &Name::new("_HID".into(), &"ACPI0013"),
                    &Name::new("_UID".into(), &ZERO),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![&Interrupt::new(
                            true,
                            true,
                            false,
                            false,
                            layout::GED_IRQ,
                        )]),
                    ),
                    &OpRegion::new(
                        "EVTS".into(),
                        OpRegionSpace::SystemIO,
                        &layout::GED_PORT,
                        &ONE,
                    ),
                    &Field::new(
                        "EVTS".into(),
                        FieldAccessType::Byte,
                        FieldLockRule::NoLock,
                        FieldUpdateRule::WriteAsZeroes,
                        vec![FieldEntry::Named(*b"PEND", 8)],
                    ),
                    &Method::new(
                        "_EVT".into(),
                        1,
                        true,
                        vec![
                            &Store::new(&Local(0), &Path::new("PEND")),
                            &And::new(&Local(1), &Local(0), &layout::GED_POWER_BUTTON),
                            &If::new(
                                &Equal::new(&Local(1), &layout::GED_POWER_BUTTON),
                                vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &0x80u8)],
                            ),
                        ],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(dsdt);
}

fn legacy(dsdt: &mut Sdt, config: &AcpiConfig) {
    let ports = |first: u16, count: u8| IO::new(first, first, 1, count);
    let com1_irq = Interrupt::new(true, true, false, false, layout::COM1_IRQ);
    if config.serial {
        device(
            dsdt,
            "COM1",
            &EISAName::new("PNP0501"),
            vec![&ports(layout::COM1_PORT, 8), &com1_irq],
        );
    }
    device(
        dsdt,
        "RTC_",
        &EISAName::new("PNP0B00"),
        vec![&ports(layout::RTC_PORT, 2)],
    );
    device(
        dsdt,
        "PEVT",
        &"QEMU0001",
        vec![&ports(layout::PVPANIC_PORT, 1)],
    );
}

/// A device of the system bus with fixed resources.
fn device(dsdt: &mut Sdt, name: &str, hid: &dyn Aml, resources: Vec<&dyn Aml>) {
    Scope::new(
        "\\_SB_".into(),
        vec![&Device::new(
            name.into(),
            vec![
                &Name::new("_HID".into(), hid),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
            ],
        )],
    )
    .to_aml_bytes(dsdt);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(mem: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn table(mem: &GuestMemory, at: u64) -> Vec<u8> {
        let len = mem.read_obj::<u32>(GuestAddress(at + 4)).unwrap();
        read(mem, at, len as usize)
    }

    fn sums_to_zero(bytes: &[u8]) -> bool {
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0
    }

    #[test]
    fn every_table_is_found_from_the_rsdp_and_sums_to_zero() {
        let mem = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let config = AcpiConfig {
            cpus: layout::MAX_CPUS,
            pci_last_bus: 3,
            pci_mmio64: 1 << 32..1 << 39,
            serial: true,
        };
        let rsdp_at = write_tables(&mem, &config).unwrap();
        let rsdp = read(&mem, rsdp_at, Rsdp::len());
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert!(sums_to_zero(&rsdp) && sums_to_zero(&rsdp[..20]));
        let xsdt = table(&mem, u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
        assert!(sums_to_zero(&xsdt));
        let tables: Vec<_> = xsdt[36..]
            .chunks_exact(8)
            .map(|at| table(&mem, u64::from_le_bytes(at.try_into().unwrap())))
            .collect();
        let signatures: Vec<_> = tables.iter().map(|t| &t[..4]).collect();
        assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG"]);
        assert!(tables.iter().all(|table| sums_to_zero(table)));
        // ACPI 6.5, 5.2.12.2: type 0, length 8, UID, APIC ID, flags.
        let processors: Vec<_> = tables[1][44..]
            .chunks_exact(8)
            .filter(|entry| entry[..2] == [0, 8])
            .map(|entry| u32::from(entry[3]))
            .collect();
        assert_eq!(processors, (0..layout::MAX_CPUS).collect::<Vec<_>>());
        assert_eq!(tables[2][54..56], [0, 3]);
        let dsdt = table(
            &mem,
            u64::from_le_bytes(tables[0][140..148].try_into().unwrap()),
        );
        assert_eq!(&dsdt[..4], b"DSDT");
        assert!(sums_to_zero(&dsdt));
    }
}
