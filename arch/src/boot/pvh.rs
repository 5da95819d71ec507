//! PVH: entering an ELF vmlinux in 32-bit mode with a start-info structure (Xen
//! `docs/misc/pvh.pandoc`, `xen/include/public/arch-x86/hvm/start_info.h`).

use linux_loader::loader::{
    Elf, KernelLoader,
    elf::{
        PvhBootCapability,
        start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info},
    },
};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{BootSource, LoadError, linux::memory_map, load_initrd, write_cmdline};
use crate::{
    GuestMemory, layout,
    regs::{Entry, Protocol},
};

/// `XEN_HVM_START_MAGIC_VALUE`.
const START_MAGIC: u32 = 0x336e_c578;
/// Version 1 has the memory map.
const START_INFO_VERSION: u32 = 1;
/// Linux's `COMMAND_LINE_SIZE` on x86, less the NUL: PVH has no field for it.
const CMDLINE_MAX: usize = 2047;

/// Xen's structures are plain integers without padding.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Plain<T>(T);

// SAFETY: each of the structures has integers only, at their natural alignment and without padding.
unsafe impl ByteValued for Plain<hvm_start_info> {}
// SAFETY: see above.
unsafe impl ByteValued for Plain<hvm_memmap_table_entry> {}
// SAFETY: see above.
unsafe impl ByteValued for Plain<hvm_modlist_entry> {}

pub(super) fn load(mem: &GuestMemory, mut source: BootSource) -> Result<Entry, LoadError> {
    let bad = |problem: String| LoadError::BadKernel {
        path: source.kernel_path.clone(),
        problem,
    };
    let kernel = Elf::load(
        mem,
        None,
        &mut source.kernel,
        Some(GuestAddress(layout::HIGH_MEMORY)),
    )
    .map_err(|error| bad(format!("cannot load the ELF file: {error}")))?;
    let PvhBootCapability::PvhEntryPresent(entry) = kernel.pvh_boot_cap else {
        return Err(bad(
            "no PVH entry: give a vmlinux built with CONFIG_PVH, or a bzImage".into(),
        ));
    };
    write_cmdline(mem, &source.cmdline, CMDLINE_MAX)?;

    let map = memory_map(mem);
    let mut start_info = hvm_start_info {
        magic: START_MAGIC,
        version: START_INFO_VERSION,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: source.rsdp,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    for (index, (addr, size, kind)) in map.into_iter().enumerate() {
        let entry = hvm_memmap_table_entry {
            addr,
            size,
            type_: kind as u32,
            reserved: 0,
        };
        let at = layout::PVH_MEMORY_MAP + (index * size_of_val(&entry)) as u64;
        mem.write_obj(Plain(entry), GuestAddress(at))?;
    }
    if let Some((path, file)) = source.initrd {
        let floor = kernel.kernel_end.next_multiple_of(layout::PAGE_SIZE);
        let (paddr, size) = load_initrd(mem, path, file, floor, layout::HIGH_RAM_START)?;
        let module = hvm_modlist_entry {
            paddr,
            size,
            ..Default::default()
        };
        start_info.nr_modules = 1;
        start_info.modlist_paddr =
            layout::PVH_START_INFO + size_of::<hvm_start_info>().next_multiple_of(8) as u64;
        mem.write_obj(Plain(module), GuestAddress(start_info.modlist_paddr))?;
    }
    mem.write_obj(Plain(start_info), GuestAddress(layout::PVH_START_INFO))?;
    Ok(Entry {
        protocol: Protocol::Pvh,
        address: entry.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_of_the_interface() {
        assert_eq!(size_of::<hvm_start_info>(), 56);
        assert_eq!(size_of::<hvm_memmap_table_entry>(), 24);
        assert_eq!(size_of::<hvm_modlist_entry>(), 32);
    }
}
