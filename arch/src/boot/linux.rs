//! Linux's 64-bit boot protocol (`Documentation/arch/x86/boot.rst`): boot parameters, memory map and
//! entry of a bzImage.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, ReadVolatile};

use super::{
    BootSource, LoadError, MIB,
    bzimage::{BzImage, HEADER_OFFSET, KASLR_FLAG},
    kaslr::Kaslr,
    load_initrd, low_ram_end,
    populate::Populate,
    unpack, write_cmdline,
};
use crate::{
    GuestMemory, layout,
    regs::{Entry, Protocol},
};

/// Offset of the 64-bit entry in the protected-mode part.
const ENTRY_64: u64 = 0x200;
/// `type_of_loader`: none of the assigned ones.
const LOADER_UNDEFINED: u8 = 0xff;

/// Offsets in the boot parameters (Linux `Documentation/arch/x86/zero-page.rst`).
const ACPI_RSDP_ADDR: u64 = 0x070;
const E820_ENTRIES: u64 = 0x1e8;
const E820_TABLE: u64 = 0x2d0;
/// Room in the table.
const E820_MAX: usize = 128;

/// Types of memory in an E820 map; PVH's map has the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryType {
    /// Usable.
    Ram = 1,
    /// Not usable.
    Reserved = 2,
}

/// What the kernel is told about guest-physical memory: start, length, type.
pub fn memory_map(mem: &GuestMemory) -> Vec<(u64, u64, MemoryType)> {
    use MemoryType::{Ram, Reserved};
    let low = low_ram_end(mem);
    let mut map = vec![
        (0, layout::CONVENTIONAL_END, Ram),
        (
            layout::CONVENTIONAL_END,
            0xa_0000 - layout::CONVENTIONAL_END,
            Reserved,
        ),
        (
            layout::ACPI_TABLES.start,
            layout::ACPI_TABLES.end - layout::ACPI_TABLES.start,
            Reserved,
        ),
        (
            layout::HIGH_MEMORY,
            low.saturating_sub(layout::HIGH_MEMORY),
            Ram,
        ),
        (
            layout::ECAM.start,
            layout::ECAM.end - layout::ECAM.start,
            Reserved,
        ),
    ];
    map.extend(
        mem.iter()
            .filter(|region| region.start_addr().0 >= layout::HIGH_RAM_START)
            .map(|region| (region.start_addr().0, region.len(), Ram)),
    );
    map
}

pub(super) fn load(
    mem: &GuestMemory,
    mut source: BootSource,
    populate: &Populate,
) -> Result<Entry, LoadError> {
    let initrd = source.initrd.take();
    let image = BzImage::open(&source.kernel_path, &source.kernel)?;
    let mut header = image.header;
    // What the loader and the kernel fill in is not the file's to say.
    header.loadflags &= !KASLR_FLAG;
    (header.ramdisk_image, header.ramdisk_size, header.setup_data) = (0, 0, 0);
    write_cmdline(mem, &source.cmdline, header.cmdline_size as usize)?;

    let init_size = u64::from(header.init_size);
    if let Some((path, file)) = initrd {
        // The kernel needs `init_size` bytes at or above its preferred address, wherever it ends up.
        let floor = header.pref_address.max(layout::HIGH_MEMORY) + init_size;
        let limit = u64::from(header.initrd_addr_max) + 1;
        let (start, size) = load_initrd(mem, path, file, floor, limit)?;
        header.ramdisk_image = start as u32;
        header.ramdisk_size = size as u32;
    }
    let room_end = match header.ramdisk_size {
        0 => low_ram_end(mem),
        _ => u64::from(header.ramdisk_image),
    };

    let unpacked = if source.guest_unpacks {
        None
    } else {
        let kaslr = Kaslr::from_cmdline(&source.cmdline);
        unpack::load(mem, &source.kernel_path, &image, room_end, kaslr, populate)?
    };
    let address = match unpacked {
        Some(kernel) => {
            if kernel.randomized {
                header.loadflags |= KASLR_FLAG;
            }
            kernel.entry
        }
        None => load_packed(mem, &source, &image, room_end, populate)? + ENTRY_64,
    };

    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = layout::CMDLINE as u32;
    mem.write_slice(
        zerocopy::IntoBytes::as_bytes(&header),
        GuestAddress(layout::ZERO_PAGE + HEADER_OFFSET),
    )?;
    mem.write_obj(
        source.rsdp,
        GuestAddress(layout::ZERO_PAGE + ACPI_RSDP_ADDR),
    )?;
    let map = memory_map(mem);
    debug_assert!(map.len() <= E820_MAX);
    mem.write_obj(
        map.len() as u8,
        GuestAddress(layout::ZERO_PAGE + E820_ENTRIES),
    )?;
    for (index, (start, len, kind)) in map.into_iter().enumerate() {
        let at = layout::ZERO_PAGE + E820_TABLE + index as u64 * 20;
        mem.write_obj(start, GuestAddress(at))?;
        mem.write_obj(len, GuestAddress(at + 8))?;
        mem.write_obj(kind as u32, GuestAddress(at + 16))?;
    }
    Ok(Entry {
        protocol: Protocol::Linux64,
        address,
    })
}

/// Loads the protected-mode part as it is; the guest decompresses it.
fn load_packed(
    mem: &GuestMemory,
    source: &BootSource,
    image: &BzImage,
    room_end: u64,
    populate: &Populate,
) -> Result<u64, LoadError> {
    let start = image.header.pref_address.max(layout::HIGH_MEMORY);
    let needed = u64::from(image.header.init_size).max(image.kernel_len);
    if start.checked_add(needed).is_none_or(|end| end > room_end) {
        return Err(LoadError::TooLarge {
            path: source.kernel_path.clone(),
            needed: needed.div_ceil(MIB),
            available: room_end.saturating_sub(start) / MIB,
        });
    }
    populate.kernel(start..start + needed, mem);
    let read_error = |error: std::io::Error| LoadError::Read {
        path: source.kernel_path.clone(),
        source: error,
    };
    let offset = image.kernel_offset();
    let file_len = source.kernel.metadata().map_err(read_error)?.len();
    let len = image.kernel_len.min(file_len.saturating_sub(offset));
    let mut kernel = &source.kernel;
    std::io::Seek::seek(&mut kernel, std::io::SeekFrom::Start(offset)).map_err(read_error)?;
    let mut slice = mem.get_slice(GuestAddress(start), len as usize)?;
    kernel
        .read_exact_volatile(&mut slice)
        .map_err(|error| read_error(std::io::Error::other(error)))?;
    Ok(start)
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write};

    use super::*;
    use crate::boot::test_image::{INIT_SIZE, PREFERRED, bzimage, vmlinux, zstd};

    const MEMORY: u64 = 64 << 20;

    fn boot(cmdline: &str, initrd: Option<u64>) -> Result<GuestMemory, LoadError> {
        let mem = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let mut kernel: File = tempfile::tempfile().unwrap();
        kernel.write_all(&bzimage(&zstd(&vmlinux(0, &[])))).unwrap();
        let initrd = initrd.map(|len| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(len).unwrap();
            ("i".into(), file)
        });
        let source = BootSource {
            kernel_path: "k".into(),
            kernel,
            initrd,
            cmdline: cmdline.into(),
            guest_unpacks: true,
            rsdp: 0xe_0000,
        };
        Populate::beside(&mem, |populate| load(&mem, source, populate))?;
        Ok(mem)
    }

    fn parameter<T: vm_memory::ByteValued>(mem: &GuestMemory, offset: u64) -> T {
        mem.read_obj(GuestAddress(layout::ZERO_PAGE + offset))
            .unwrap()
    }

    #[test]
    fn boot_parameters_say_where_everything_is() {
        let mem = boot("quiet", Some(5000)).unwrap();
        assert_eq!(parameter::<u8>(&mem, 0x210), LOADER_UNDEFINED);
        assert_eq!(parameter::<u64>(&mem, ACPI_RSDP_ADDR), 0xe_0000);
        let cmdline = u64::from(parameter::<u32>(&mem, 0x228));
        assert_eq!(
            mem.read_obj::<[u8; 6]>(GuestAddress(cmdline)).unwrap(),
            *b"quiet\0"
        );
        let initrd = (parameter::<u32>(&mem, 0x218), parameter::<u32>(&mem, 0x21c));
        assert_eq!(initrd, ((MEMORY - 2 * layout::PAGE_SIZE) as u32, 5000));
        assert_eq!(
            usize::from(parameter::<u8>(&mem, E820_ENTRIES)),
            memory_map(&mem).len()
        );
        let conventional = parameter::<u64>(&mem, E820_TABLE + 8);
        assert_eq!(conventional, layout::CONVENTIONAL_END);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let room = MEMORY - PREFERRED - u64::from(INIT_SIZE);
        assert!(boot("", Some(room)).is_ok());
        for size in [room + 1, MEMORY, 1 << 40] {
            assert!(matches!(
                boot("", Some(size)),
                Err(LoadError::TooLarge { .. })
            ));
        }
    }

    #[test]
    fn the_command_line_is_bounded_by_the_kernel() {
        assert!(boot(&"x".repeat(2047), None).is_ok());
        assert!(matches!(
            boot(&"x".repeat(2048), None),
            Err(LoadError::CmdlineTooLong {
                len: 2048,
                max: 2047
            })
        ));
    }

    #[test]
    fn the_map_is_sorted_and_does_not_overlap() {
        let mem = GuestMemory::from_ranges(&[
            (GuestAddress(0), 64 << 20),
            (GuestAddress(layout::HIGH_RAM_START), 64 << 20),
        ])
        .unwrap();
        let map = memory_map(&mem);
        for pair in map.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
        let ram: u64 = map
            .iter()
            .filter(|(.., kind)| *kind == MemoryType::Ram)
            .map(|(_, len, _)| len)
            .sum();
        let holes = layout::HIGH_MEMORY - layout::CONVENTIONAL_END;
        assert_eq!(ram, (128 << 20) - holes);
    }
}
