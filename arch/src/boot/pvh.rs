//! PVH: entering an ELF vmlinux in 32-bit mode with a start-info structure (Xen
//! `docs/misc/pvh.pandoc`, `xen/include/public/arch-x86/hvm/start_info.h`).

use std::os::unix::fs::FileExt;

use linux_loader::loader::{
    self, Elf, KernelLoader,
    elf::{
        self, PvhBootCapability,
        start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info},
    },
};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{
    BootSource, LoadError, MIB,
    linux::memory_map,
    load_initrd, low_ram_end,
    populate::Populate,
    vmlinux::{self, Vmlinux},
    write_cmdline,
};
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

/// The ELF header and, in any kernel, the program headers.
const HEADERS: usize = 4096;

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

pub(super) fn load(
    mem: &GuestMemory,
    mut source: BootSource,
    populate: &Populate,
) -> Result<Entry, LoadError> {
    let path = source.kernel_path.clone();
    let bad = |problem: String| LoadError::BadKernel {
        path: path.clone(),
        problem,
    };
    let mut start = [0; HEADERS];
    let read = source
        .kernel
        .read_at(&mut start, 0)
        .map_err(|_| LoadError::NotAKernel(path.clone()))?;
    let headers = &start[..read];
    vmlinux::header(headers).map_err(|_| LoadError::NotAKernel(path.clone()))?;
    if let Ok(kernel) = Vmlinux::parse(headers) {
        populate.kernel(kernel.physical_range(), mem);
    }
    let kernel = Elf::load(
        mem,
        None,
        &mut source.kernel,
        Some(GuestAddress(layout::HIGH_MEMORY)),
    )
    .map_err(|error| {
        bad(match error {
            loader::Error::Elf(elf::Error::ReadKernelImage) => {
                "a segment lies outside of the file or of the guest's RAM: copy the file again, or give \
                 more --memory"
                    .into()
            }
            error => format!("cannot load the ELF file: {error}"),
        })
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = kernel.pvh_boot_cap else {
        return Err(bad(
            "no PVH entry: give a vmlinux built with CONFIG_PVH, or a bzImage".into(),
        ));
    };
    // The loader checks that the file's part of each segment is in RAM; the kernel's bss comes behind.
    let room = low_ram_end(mem);
    if kernel.kernel_end > room {
        return Err(LoadError::TooLarge {
            path,
            needed: kernel.kernel_end.div_ceil(MIB),
            available: room / MIB,
        });
    }
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
    use std::{fs::File, io::Write};

    use proptest::prelude::*;

    use super::*;
    use crate::boot::{
        load,
        test_image::{PREFERRED, vmlinux},
    };

    const MEMORY: usize = 64 << 20;
    /// Where the test kernels have their note, in front of the first segment.
    const NOTE: usize = 0x1000;

    /// A vmlinux with `note` in a third segment.
    fn with_note(note: &[u8]) -> Vec<u8> {
        let mut file = vmlinux(0, &[]);
        let mut header = Vec::new();
        header.extend(4u32.to_le_bytes());
        header.extend(4u32.to_le_bytes());
        for value in [NOTE as u64, 0, 0, note.len() as u64, note.len() as u64, 4] {
            header.extend(value.to_le_bytes());
        }
        file[56..58].copy_from_slice(&3u16.to_le_bytes());
        file[64 + 2 * 56..][..header.len()].copy_from_slice(&header);
        file[NOTE..NOTE + note.len()].copy_from_slice(note);
        file
    }

    /// `XEN_ELFNOTE_PHYS32_ENTRY`.
    fn entry_note(entry: u32) -> Vec<u8> {
        let mut note = Vec::new();
        for word in [4u32, 4, 18] {
            note.extend(word.to_le_bytes());
        }
        note.extend(b"Xen\0");
        note.extend(entry.to_le_bytes());
        note
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        file
    }

    fn boot(mem: &GuestMemory, kernel: &[u8], initrd: &[u8]) -> Result<Entry, LoadError> {
        let source = BootSource {
            kernel_path: "k".into(),
            kernel: file(kernel),
            initrd: (!initrd.is_empty()).then(|| ("i".into(), file(initrd))),
            cmdline: "quiet".into(),
            guest_unpacks: false,
            rsdp: 0xe_0000,
        };
        load(mem, source)
    }

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
    }

    #[test]
    fn start_info_leads_to_everything() {
        let mem = memory();
        let entry = boot(&mem, &with_note(&entry_note(0x100_0040)), &[0x33; 5000]).unwrap();
        assert_eq!(
            entry,
            Entry {
                protocol: Protocol::Pvh,
                address: 0x100_0040
            }
        );
        let info: Plain<hvm_start_info> =
            mem.read_obj(GuestAddress(layout::PVH_START_INFO)).unwrap();
        let info = info.0;
        assert_eq!((info.magic, info.version), (0x336e_c578, 1));
        assert_eq!(info.rsdp_paddr, 0xe_0000);
        assert_eq!(
            mem.read_obj::<[u8; 6]>(GuestAddress(info.cmdline_paddr))
                .unwrap(),
            *b"quiet\0"
        );
        assert_eq!((info.nr_modules, info.flags), (1, 0));
        let module: Plain<hvm_modlist_entry> =
            mem.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!(
            (module.0.paddr % layout::PAGE_SIZE, module.0.size),
            (0, 5000)
        );
        let last = GuestAddress(module.0.paddr + 4999);
        assert_eq!(mem.read_obj::<u8>(last).unwrap(), 0x33);
        let last_entry = u64::from(info.memmap_entries) - 1;
        let size = size_of::<hvm_memmap_table_entry>() as u64;
        let map: Plain<hvm_memmap_table_entry> = mem
            .read_obj(GuestAddress(info.memmap_paddr + last_entry * size))
            .unwrap();
        assert_eq!(map.0.addr, layout::ECAM.start);
        assert_eq!(mem.read_obj::<u8>(GuestAddress(PREFERRED)).unwrap(), 0x11);
    }

    #[test]
    fn files_that_cannot_be_entered_are_told_why() {
        let good = with_note(&entry_note(0x100_0040));
        let with = |at: usize, bytes: &[u8]| {
            let mut file = good.clone();
            file[at..at + bytes.len()].copy_from_slice(bytes);
            file
        };
        for (kernel, words) in [
            (vmlinux(0, &[]), "no PVH entry"),
            (with(NOTE + 8, &[17]), "no PVH entry"),
            // 32 bits; AArch64.
            (with(4, &[1]), "not a kernel"),
            (with(18, &[183]), "not a kernel"),
            (good[..40].to_vec(), "not a kernel"),
            (good[..good.len() - 64].to_vec(), "outside of the file"),
            // The first segment's p_paddr, and its p_memsz.
            (
                with(64 + 24, &u64::MAX.to_le_bytes()),
                "outside of the file",
            ),
            (with(64 + 40, &(1u64 << 40).to_le_bytes()), "does not fit"),
        ] {
            let error = boot(&memory(), &kernel, &[]).unwrap_err().to_string();
            assert!(error.contains(words), "{error:?} instead of {words:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        /// Files that are cut or changed anywhere load or fail, and that is all.
        #[test]
        fn corrupt_files_are_survived(
            at in prop_oneof![0usize..240, NOTE..NOTE + 16],
            value in any::<u64>(),
            cut in prop::option::of(0usize..0x60_0000),
        ) {
            let mut file = with_note(&entry_note(0x100_0040));
            file[at..at + 8].copy_from_slice(&value.to_le_bytes());
            file.truncate(cut.unwrap_or(file.len()));
            let _ = boot(&memory(), &file, &[]);
        }
    }

    #[test]
    fn structures_have_the_sizes_of_the_interface() {
        assert_eq!(size_of::<hvm_start_info>(), 56);
        assert_eq!(size_of::<hvm_memmap_table_entry>(), 24);
        assert_eq!(size_of::<hvm_modlist_entry>(), 32);
    }
}
