//! Registers that the first vCPU starts with.

use kvm_bindings::{kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::{GuestMemory, layout};

/// How a kernel wants to be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// 64-bit mode, paging on, RSI = boot parameters (Linux `Documentation/arch/x86/boot.rst`).
    Linux64,
    /// 32-bit mode, paging off, EBX = start info (Xen `docs/misc/pvh.pandoc`).
    Pvh,
}

/// Where and how the kernel starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Protocol of the entry.
    pub protocol: Protocol,
    /// Guest-physical address of the first instruction.
    pub address: u64,
}

/// The first vCPU's state.
#[derive(Clone, Debug)]
pub struct InitialState {
    /// General registers.
    pub regs: kvm_regs,
    /// Floating-point unit.
    pub fpu: kvm_fpu,
    /// Model-specific registers.
    pub msrs: Vec<kvm_msr_entry>,
    protocol: Protocol,
}

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1 << 0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, default type write-back.
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// Page-table entry: present, writable.
const PTE_TABLE: u64 = 0b11;
/// Page-directory entry: present, writable, 2 MiB page.
const PDE_2M: u64 = 1 << 7 | 0b11;

/// Indices into the table: Linux wants 2 and 3 (`__BOOT_CS`, `__BOOT_DS`).
const CODE: u16 = 2;
const DATA: u16 = 3;
const TASK: u16 = 4;

/// Segment descriptor access byte and flags of code, data and task segments (Intel SDM 3A, 3.4.5).
const ACCESS_CODE: u8 = 0x9b;
const ACCESS_DATA: u8 = 0x93;
const ACCESS_TASK: u8 = 0x8b;
const FLAGS_CODE64: u8 = 0xa;
const FLAGS_32: u8 = 0xc;

fn segment(index: u16, access: u8, flags: u8, limit: u32) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit,
        selector: index * 8,
        type_: access & 0xf,
        s: (access >> 4) & 1,
        dpl: (access >> 5) & 3,
        present: access >> 7,
        avl: flags & 1,
        l: (flags >> 1) & 1,
        db: (flags >> 2) & 1,
        g: flags >> 3,
        unusable: 0,
        padding: 0,
    }
}

/// The 8 bytes of a segment with base 0, as the processor reads them from the table.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    limit & 0xffff | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

impl Protocol {
    fn segments(self) -> [kvm_segment; 3] {
        let code_flags = match self {
            Protocol::Linux64 => FLAGS_CODE64,
            Protocol::Pvh => FLAGS_32,
        };
        [
            segment(CODE, ACCESS_CODE, code_flags, u32::MAX),
            segment(DATA, ACCESS_DATA, FLAGS_32, u32::MAX),
            segment(TASK, ACCESS_TASK, 0, 0x67),
        ]
    }
}

impl InitialState {
    /// Computes the state for `entry` and writes the tables that it points to into guest memory.
    pub fn prepare(mem: &GuestMemory, entry: Entry) -> Result<Self, GuestMemoryError> {
        let [code, data, task] = entry.protocol.segments();
        let gdt = [
            0,
            0,
            descriptor(&code),
            descriptor(&data),
            descriptor(&task),
            0,
        ];
        for (index, descriptor) in gdt.iter().enumerate() {
            mem.write_obj(*descriptor, GuestAddress(layout::GDT + index as u64 * 8))?;
        }
        let mut regs = kvm_regs {
            rip: entry.address,
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        };
        match entry.protocol {
            Protocol::Linux64 => {
                write_page_tables(mem)?;
                regs.rsi = layout::ZERO_PAGE;
            }
            Protocol::Pvh => regs.rbx = layout::PVH_START_INFO,
        }
        let msr = |index, data| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        Ok(Self {
            regs,
            // Power-on values (Intel SDM 3A, table 11-1).
            fpu: kvm_fpu {
                fcw: 0x37f,
                mxcsr: 0x1f80,
                ..Default::default()
            },
            msrs: vec![
                msr(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
                msr(MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
            ],
            protocol: entry.protocol,
        })
    }

    /// Changes the system registers of a vCPU fresh from KVM.
    pub fn apply_sregs(&self, sregs: &mut kvm_sregs) {
        let [code, data, task] = self.protocol.segments();
        sregs.cs = code;
        for register in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ss,
        ] {
            *register = data;
        }
        sregs.tr = task;
        sregs.gdt.base = layout::GDT;
        sregs.gdt.limit = (usize::from(TASK + 2) * 8 - 1) as u16;
        sregs.cr0 = CR0_PE | CR0_ET;
        if self.protocol == Protocol::Linux64 {
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
    }
}

/// Maps the first 4 GiB to themselves with 2 MiB pages: every processor has those.
fn write_page_tables(mem: &GuestMemory) -> Result<(), GuestMemoryError> {
    const TABLE: u64 = layout::PAGE_SIZE;
    const DIRECTORIES: u64 = 4;
    let pdpt = layout::PAGE_TABLES + TABLE;
    let first_directory = pdpt + TABLE;
    mem.write_obj(pdpt | PTE_TABLE, GuestAddress(layout::PAGE_TABLES))?;
    for index in 0..DIRECTORIES {
        let directory = first_directory + index * TABLE;
        mem.write_obj(directory | PTE_TABLE, GuestAddress(pdpt + index * 8))?;
        let mut entries = [0u8; TABLE as usize];
        for (entry, bytes) in (index * 512..).zip(entries.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&(entry << 21 | PDE_2M).to_le_bytes());
        }
        mem.write_slice(&entries, GuestAddress(directory))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    #[test]
    fn descriptors_match_their_segments() {
        let [code, data, _] = Protocol::Linux64.segments();
        assert_eq!(descriptor(&code), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data), 0x00cf_9300_0000_ffff);
        assert_eq!(
            descriptor(&Protocol::Pvh.segments()[0]),
            0x00cf_9b00_0000_ffff
        );
    }

    #[test]
    fn the_identity_map_reaches_the_last_byte_below_4_gib() {
        let mem = memory();
        let entry = Entry {
            protocol: Protocol::Linux64,
            address: 0x100_0000,
        };
        InitialState::prepare(&mem, entry).unwrap();
        let read = |address| mem.read_obj::<u64>(GuestAddress(address)).unwrap();
        let pdpt = read(layout::PAGE_TABLES) & !0xfff;
        let directory = read(pdpt + 3 * 8) & !0xfff;
        assert_eq!(read(directory + 511 * 8), 0xffe0_0000 | PDE_2M);
    }

    #[test]
    fn pvh_starts_without_paging() {
        let mem = memory();
        let entry = Entry {
            protocol: Protocol::Pvh,
            address: 0x100_0000,
        };
        let state = InitialState::prepare(&mem, entry).unwrap();
        let mut sregs = kvm_sregs::default();
        state.apply_sregs(&mut sregs);
        assert_eq!(sregs.cr0 & (CR0_PG | CR0_PE), CR0_PE);
        assert_eq!((sregs.cs.l, sregs.cs.db), (0, 1));
        assert_eq!(state.regs.rbx, layout::PVH_START_INFO);
    }
}
