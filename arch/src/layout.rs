//! Guest-physical addresses, I/O ports and interrupt lines of the machine.
//!
//! RAM starts at 0 and continues above 4 GiB past the 32-bit hole. All ranges are half open.

use std::ops::Range;

use vm_memory::GuestAddress;

/// The unit of guest-physical mappings.
pub const PAGE_SIZE: u64 = 4096;
/// The most vCPUs: their APIC ids must fit the 8 bits of an interrupt message's destination, of which
/// 255 means all.
pub const MAX_CPUS: u32 = 254;

/// First byte that is not RAM below 4 GiB: the 32-bit hole starts here (3 GiB).
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM continues above the 32-bit hole.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// Global descriptor table that the first vCPU starts with.
pub const GDT: u64 = 0x500;
/// PVH start info, with its module list behind.
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH memory map.
pub const PVH_MEMORY_MAP: u64 = 0x6800;
/// Linux's boot parameters ("zero page").
pub const ZERO_PAGE: u64 = 0x7000;
/// Page tables that the first vCPU starts with: a PML4, a PDPT and four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line, up to [`CMDLINE_MAX`] bytes with its NUL.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the kernel command line.
pub const CMDLINE_MAX: usize = 0x1_0000;
/// End of conventional memory: a PC's extended BIOS data and video memory follow.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// ACPI tables, within the BIOS area, so that guests find the RSDP by scanning too.
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0xf_0000;
/// Where a BIOS starts: its 16 last bytes.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where memory goes on after the BIOS area.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// 32-bit window for BARs and non-prefetchable bridge windows.
pub const PCI_MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI Express enhanced configuration access: 256 buses of 1 MiB.
pub const ECAM: Range<u64> = 0xe000_0000..0xf000_0000;
/// The in-kernel IOAPIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// The local APIC page; MSI addresses start here too.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Identity-map page that KVM needs on Intel hosts without unrestricted guest (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM needs on Intel hosts (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS: u64 = 0xfffb_d000;
/// HyperTransport range that AMD processors never decode as memory: no 64-bit window may touch it.
pub const AMD_HT_HOLE: Range<u64> = 0xfd_0000_0000..0x100_0000_0000;

/// Pins of the IOAPIC that PCI's interrupt lines share: the last third, which no legacy device has.
pub const PCI_IRQS: Range<u32> = 16..24;

/// Interrupt line of pin `pin` (0 for INTA to 3) of device `device` on the root bus. Devices are spread over
/// the lines, and a bridge passes its functions' pins on rotated by their device numbers (PCI-to-PCI Bridge
/// 1.2, 9.1).
pub fn pci_irq(device: u8, pin: u8) -> u32 {
    let lines = PCI_IRQS.end - PCI_IRQS.start;
    PCI_IRQS.start + (u32::from(device) + u32::from(pin)) % lines
}

/// I/O window for PCI I/O BARs and bridges.
pub const PCI_IO: Range<u16> = 0x1000..0xffff;

/// First serial port (16550A).
pub const COM1_PORT: u16 = 0x3f8;
/// Interrupt line of the first serial port.
pub const COM1_IRQ: u32 = 4;
/// MC146818 clock: index and data port.
pub const RTC_PORT: u16 = 0x70;
/// i8042 data port; the command and status port is 4 above.
pub const I8042_PORT: u16 = 0x60;
/// pvpanic's event register (QEMU `docs/specs/pvpanic`).
pub const PVPANIC_PORT: u16 = 0x505;
/// CONFIG_ADDRESS of PCI configuration mechanism 1; CONFIG_DATA is 4 above.
pub const PCI_CONFIG_ADDRESS_PORT: u16 = 0xcf8;

/// Pending events of the ACPI generic event device, one byte, read to clear.
pub const GED_PORT: u16 = 0x600;
/// Interrupt line of the ACPI generic event device (edge triggered).
pub const GED_IRQ: u32 = 9;
/// Bit of [`GED_PORT`]: the power button was pressed.
pub const GED_POWER_BUTTON: u8 = 1 << 0;
/// ACPI sleep control register (ACPI 6.5, 4.8.3.7), one byte.
pub const SLEEP_CONTROL_PORT: u16 = 0x604;
/// ACPI sleep status register, one byte.
pub const SLEEP_STATUS_PORT: u16 = 0x605;
/// Value of `SLP_TYP` that means S5, soft off.
pub const SLEEP_TYPE_S5: u8 = 5;
/// ACPI reset register, one byte.
pub const RESET_PORT: u16 = 0x606;
/// What a write to [`RESET_PORT`] must carry.
pub const RESET_VALUE: u8 = 1;

/// Where `size` bytes of RAM lie: around the 32-bit hole.
pub fn ram_ranges(size: u64) -> Vec<(GuestAddress, u64)> {
    let mut ranges = vec![(GuestAddress(0), size.min(LOW_RAM_END))];
    if size > LOW_RAM_END {
        ranges.push((GuestAddress(HIGH_RAM_START), size - LOW_RAM_END));
    }
    ranges
}

/// Alignment of the 64-bit PCI window: the size of the largest page.
const MMIO64_ALIGN: u64 = 1 << 30;
/// How much of the 64-bit space the window takes where there is more: enough for any set of GPUs.
const MMIO64_SIZE: u64 = 1 << 40;

/// The 64-bit prefetchable window for BARs: above RAM, within `physical_bits` of address, clear of the
/// range that AMD processors keep for HyperTransport. Empty if RAM leaves no room.
pub fn pci_mmio64(ram_size: u64, physical_bits: u8) -> Range<u64> {
    let limit = 1u64 << physical_bits.clamp(32, 52);
    let ram_end = ram_ranges(ram_size)
        .last()
        .map_or(0, |(start, len)| start.0.saturating_add(*len))
        .max(HIGH_RAM_START);
    let start = ram_end.next_multiple_of(MMIO64_ALIGN);
    let below_hole = start..limit.min(AMD_HT_HOLE.start);
    let above_hole = start.max(AMD_HT_HOLE.end)..limit;
    let window = [below_hole, above_hole]
        .into_iter()
        .max_by_key(|range| range.end.saturating_sub(range.start).min(MMIO64_SIZE / 2))
        .unwrap_or(0..0);
    let end = window.end.min(window.start.saturating_add(MMIO64_SIZE));
    window.start..end.max(window.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(ram_ranges(1 << 30), [(GuestAddress(0), 1 << 30)]);
        assert_eq!(
            ram_ranges(6 << 30),
            [
                (GuestAddress(0), LOW_RAM_END),
                (GuestAddress(HIGH_RAM_START), 3 << 30)
            ]
        );
    }

    #[test]
    fn every_pin_has_a_line_of_pcis() {
        for device in 0..32 {
            for pin in 0..4 {
                assert!(PCI_IRQS.contains(&pci_irq(device, pin)));
            }
        }
        assert_ne!(pci_irq(1, 0), pci_irq(2, 0));
    }

    #[test]
    fn the_window_fits_the_address_bits_and_misses_the_hole() {
        for bits in 36..=52 {
            for ram in [128 << 20, 6 << 30, 1 << 35, 1 << 40] {
                let window = pci_mmio64(ram, bits);
                assert!(window.end <= 1 << bits || window.is_empty());
                assert!(window.end <= AMD_HT_HOLE.start || window.start >= AMD_HT_HOLE.end);
                let (start, len) = *ram_ranges(ram).last().unwrap();
                assert!(window.start >= start.0 + len);
            }
        }
        assert!(pci_mmio64(6 << 30, 40).end - pci_mmio64(6 << 30, 40).start >= 1 << 38);
    }
}
