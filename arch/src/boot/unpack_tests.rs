//! Kernels made up for the test are loaded, and read back from guest memory.

use std::{fs::File, io::Write};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::boot::{
    BootSource, LoadError,
    bzimage::KASLR_FLAG,
    kaslr::KERNEL_IMAGE_SIZE,
    test_image::{
        ADDRESS_64, DATA, INIT_SIZE, PACKERS, PREFERRED, TEXT, bzimage, place, vmlinux, zstd,
    },
};
use crate::layout;

const MEMORY: usize = 128 << 20;

struct Loaded {
    mem: GuestMemory,
    entry: u64,
    loadflags: u8,
}

impl Loaded {
    /// Where the kernel's first byte is.
    fn base(&self) -> u64 {
        self.entry - 0x10
    }

    fn read<T: vm_memory::ByteValued>(&self, offset: u64) -> T {
        self.mem
            .read_obj(GuestAddress(self.base() + offset))
            .unwrap()
    }
}

fn load_image(image: &[u8], cmdline: &str) -> Result<Loaded, LoadError> {
    let mut kernel = tempfile::tempfile().unwrap();
    kernel.write_all(image).unwrap();
    let initrd: File = tempfile::tempfile().unwrap();
    initrd.set_len(1 << 20).unwrap();
    std::io::Seek::rewind(&mut kernel).unwrap();
    let mem = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let source = BootSource {
        kernel_path: "k".into(),
        kernel,
        initrd: Some(("i".into(), initrd)),
        cmdline: cmdline.into(),
        guest_unpacks: false,
        rsdp: 0xe_0000,
    };
    let entry = crate::boot::load(&mem, source)?.address;
    let loadflags = mem
        .read_obj(GuestAddress(layout::ZERO_PAGE + 0x211))
        .unwrap();
    Ok(Loaded {
        mem,
        entry,
        loadflags,
    })
}

/// What must hold of the kernel wherever it is; the offset that its addresses moved by.
fn check(loaded: &Loaded) -> u64 {
    assert_eq!(loaded.base() % 0x20_0000, 0);
    assert!(loaded.base() >= MIN_PHYSICAL_BASE);
    assert!(loaded.base() + u64::from(INIT_SIZE) <= (MEMORY as u64) - (1 << 20));
    assert_eq!(loaded.read::<u64>(TEXT), 0x1111_1111_1111_1111);
    assert_eq!(loaded.read::<u32>(DATA + 0xffc), 0x2222_2222);
    for offset in [0x1000, DATA - 8, DATA + 0x1000, DATA + 0x2ff8] {
        assert_eq!(loaded.read::<u64>(offset), 0, "{offset:#x} is not clear");
    }
    loaded.read::<u64>(DATA).wrapping_sub(ADDRESS_64)
}

#[test]
fn every_format_unpacks_in_place() {
    for (_, pack) in PACKERS {
        for gap in [0, 0x10_0000] {
            let file = vmlinux(gap, &[&[place(0)], &[place(8)]]);
            let loaded = load_image(&bzimage(&pack(&file)), "nokaslr").unwrap();
            assert_eq!(check(&loaded), 0);
            assert_eq!(loaded.base(), PREFERRED);
            assert_eq!(loaded.loadflags & KASLR_FLAG, 0);
        }
    }
}

#[test]
fn addresses_move_by_one_offset_in_all_lists() {
    for old in [false, true] {
        let lists: &[&[u32]] = if old {
            &[&[place(0)], &[place(12)], &[place(8)]]
        } else {
            &[&[place(0)], &[place(8)]]
        };
        let image = bzimage(&zstd(&vmlinux(0, lists)));
        let mut offsets = Vec::new();
        for _ in 0..8 {
            let loaded = load_image(&image, "quiet").unwrap();
            let offset = check(&loaded);
            assert_eq!(offset % 0x20_0000, 0);
            assert!(PREFERRED + offset + u64::from(INIT_SIZE) <= KERNEL_IMAGE_SIZE);
            let low = (ADDRESS_64 as u32).wrapping_add(offset as u32);
            assert_eq!(loaded.read::<u32>(DATA + 8), low);
            let subtracted = if old { offset as u32 } else { 0 };
            let expected = 0x5000u32.wrapping_sub(subtracted);
            assert_eq!(loaded.read::<u32>(DATA + 12), expected);
            assert_eq!(loaded.loadflags & KASLR_FLAG, KASLR_FLAG);
            offsets.push(offset);
        }
        offsets.sort_unstable();
        offsets.dedup();
        assert!(offsets.len() > 1, "always moved by {offsets:x?}");
    }
}

#[test]
fn a_kernel_without_relocations_keeps_its_addresses() {
    let loaded = load_image(&bzimage(&zstd(&vmlinux(0, &[]))), "").unwrap();
    assert_eq!(check(&loaded), 0);
    assert_eq!(loaded.loadflags & KASLR_FLAG, 0);
}

#[test]
fn an_unknown_format_is_left_to_the_guest() {
    let loaded = load_image(&bzimage(&[0x42; 4096]), "").unwrap();
    assert_eq!(loaded.entry, PREFERRED + 0x200);
}

#[test]
fn lies_in_the_file_are_errors() {
    let good = vmlinux(0, &[&[place(0)], &[place(8)]]);
    let with = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let outside = vmlinux(0, &[&[place(1 << 30)], &[]]);
    for (what, file) in [
        ("no ELF file", with(0, b"ELF?")),
        ("an entry outside", with(24, &u64::MAX.to_le_bytes())),
        ("headers outside", with(32, &u64::MAX.to_le_bytes())),
        ("no segments", with(56, &[0, 0])),
        (
            "a segment outside of the file",
            with(64 + 8, &u64::MAX.to_le_bytes()),
        ),
        (
            "a segment outside of memory",
            with(64 + 24, &u64::MAX.to_le_bytes()),
        ),
        ("a segment below", with(64 + 24, &0u64.to_le_bytes())),
        ("a huge segment", with(64 + 40, &u64::MAX.to_le_bytes())),
        (
            "segments on each other",
            with(64 + 56 + 24, &PREFERRED.to_le_bytes()),
        ),
        ("a relocation outside", outside),
    ] {
        let result = load_image(&bzimage(&zstd(&file)), "");
        assert!(
            matches!(result, Err(LoadError::BadKernel { .. })),
            "{what} is accepted"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    /// Files that are cut or changed anywhere load or fail, and that is all.
    #[test]
    fn corrupt_kernels_are_survived(
        at in 0usize..6000,
        value in any::<u64>(),
        deep in any::<bool>(),
        cut in prop::option::of(0usize..1_000_000),
    ) {
        let mut file = vmlinux(0, &[&[place(0)], &[place(8)]]);
        if deep {
            file[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let mut image = bzimage(&zstd(&file));
        if !deep {
            let at = at % (image.len() - 8);
            image[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        if let Some(cut) = cut {
            image.truncate(cut);
        }
        let _ = load_image(&image, "");
    }
}
