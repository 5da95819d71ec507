//! Kernels made up for the test: small ELF files with segments and relocations, packed in each format.

use std::{fs::File, io::Write};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::boot::{BootSource, LoadError};

const PREFERRED: u64 = 0x100_0000;
const INIT_SIZE: u32 = 4 << 20;
const MEMORY: usize = 128 << 20;
/// Offsets of the two segments in memory, and what they hold.
const TEXT: u64 = 0;
const DATA: u64 = 0x20_0000;
const ADDRESS_64: u64 = START_KERNEL_MAP + PREFERRED + 0x40;

/// A kernel with a 64-bit address at the start of its data and the low half of one behind. `gap` is how
/// far the second segment is from its place in the file.
fn vmlinux(gap: u64, relocations: &[&[u32]]) -> Vec<u8> {
    let text = SEGMENT_OFFSET as usize;
    let data = (SEGMENT_OFFSET + DATA - gap) as usize;
    let mut file = vec![0xee; data + 0x1000];
    let mut header = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    header.resize(24, 0);
    header.extend((PREFERRED + 0x10).to_le_bytes());
    header.extend(64u64.to_le_bytes());
    header.extend((data as u64 + 0x1000).to_le_bytes());
    header.resize(54, 0);
    header.extend(56u16.to_le_bytes());
    header.extend(2u16.to_le_bytes());
    header.resize(64, 0);
    for (offset, at, memory) in [(text, TEXT, 0x1000u64), (data, DATA, 0x3000)] {
        header.extend(PT_LOAD.to_le_bytes());
        header.extend(7u32.to_le_bytes());
        header.extend((offset as u64).to_le_bytes());
        header.extend((START_KERNEL_MAP + PREFERRED + at).to_le_bytes());
        header.extend((PREFERRED + at).to_le_bytes());
        header.extend(0x1000u64.to_le_bytes());
        header.extend(memory.to_le_bytes());
        header.extend(0x1000u64.to_le_bytes());
    }
    file[..header.len()].copy_from_slice(&header);
    file[text..text + 0x1000].fill(0x11);
    file[data..data + 0x1000].fill(0x22);
    file[data..data + 8].copy_from_slice(&ADDRESS_64.to_le_bytes());
    file[data + 8..data + 12].copy_from_slice(&(ADDRESS_64 as u32).to_le_bytes());
    file[data + 12..data + 16].copy_from_slice(&0x5000u32.to_le_bytes());
    for list in relocations {
        file.extend(0u32.to_le_bytes());
        for address in *list {
            file.extend(address.to_le_bytes());
        }
    }
    file
}

/// Virtual address of a byte of the data segment, as relocations have it.
fn place(offset: u64) -> u32 {
    (START_KERNEL_MAP + PREFERRED + DATA + offset) as u32
}

fn bzimage(payload: &[u8]) -> Vec<u8> {
    const SETUP: usize = 1024;
    let mut image = vec![0; SETUP];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &(payload.len().div_ceil(16) as u32).to_le_bytes());
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    put(0x258, &PREFERRED.to_le_bytes());
    put(0x260, &INIT_SIZE.to_le_bytes());
    image.extend(payload);
    image.resize(image.len().next_multiple_of(16), 0);
    image
}

fn with_length(mut packed: Vec<u8>, file: &[u8]) -> Vec<u8> {
    packed.extend((file.len() as u32).to_le_bytes());
    packed
}

fn zstd(file: &[u8]) -> Vec<u8> {
    with_length(zstd::bulk::compress(file, 1).unwrap(), file)
}

fn gzip(file: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(file).unwrap();
    encoder.finish().unwrap()
}

fn xz(file: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    liblzma::read::XzEncoder::new(file, 0)
        .read_to_end(&mut packed)
        .unwrap();
    with_length(packed, file)
}

fn lz4(file: &[u8]) -> Vec<u8> {
    let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
    for block in file.chunks(1 << 20) {
        let block = lz4_flex::block::compress(block);
        packed.extend((block.len() as u32).to_le_bytes());
        packed.extend(block);
    }
    with_length(packed, file)
}

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
    for pack in [zstd, gzip, xz, lz4] {
        for gap in [0, 0x10_0000] {
            let file = vmlinux(gap, &[&[place(0)], &[place(8)]]);
            let loaded = load_image(&bzimage(&pack(&file)), "nokaslr").unwrap();
            assert_eq!(check(&loaded), 0);
            assert_eq!(loaded.base(), PREFERRED);
            assert_eq!(loaded.loadflags & KASLR, 0);
        }
    }
}

const KASLR: u8 = crate::boot::bzimage::KASLR_FLAG;

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
            assert_eq!(loaded.loadflags & KASLR, KASLR);
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
    assert_eq!(loaded.loadflags & KASLR, 0);
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
