//! Kernels made up for tests: small ELF files with segments and relocations, packed in each format.

use std::io::{Read, Write};

use super::{payload::Format, relocations::START_KERNEL_MAP};

/// Packs a kernel as Linux's build does.
pub type Packer = fn(&[u8]) -> Vec<u8>;

/// The packer of each format.
pub const PACKERS: [(Format, Packer); 4] = [
    (Format::Zstd, zstd),
    (Format::Gzip, gzip),
    (Format::Xz, xz),
    (Format::Lz4, lz4),
];

/// Where the kernels are linked.
pub const PREFERRED: u64 = 0x100_0000;
/// `init_size` of the kernels.
pub const INIT_SIZE: u32 = 4 << 20;
/// Offsets of the two segments in memory.
pub const TEXT: u64 = 0;
pub const DATA: u64 = 0x20_0000;
/// Offset of the first segment in the file.
const TEXT_IN_FILE: u64 = 2 << 20;
/// The address that the data starts with.
pub const ADDRESS_64: u64 = START_KERNEL_MAP + PREFERRED + 0x40;

/// A kernel with a 64-bit address at the start of its data and the low half of one behind. `gap` is how
/// far the second segment is from its place in the file.
pub fn vmlinux(gap: u64, relocations: &[&[u32]]) -> Vec<u8> {
    let text = TEXT_IN_FILE as usize;
    let data = (TEXT_IN_FILE + DATA - gap) as usize;
    let mut file = vec![0xee; data + 0x1000];
    let mut header = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    header.resize(18, 0);
    header.extend(62u16.to_le_bytes());
    header.resize(24, 0);
    header.extend((PREFERRED + 0x10).to_le_bytes());
    header.extend(64u64.to_le_bytes());
    header.extend((data as u64 + 0x1000).to_le_bytes());
    header.resize(54, 0);
    header.extend(56u16.to_le_bytes());
    header.extend(2u16.to_le_bytes());
    header.resize(64, 0);
    for (offset, at, memory) in [(text, TEXT, 0x1000u64), (data, DATA, 0x3000)] {
        header.extend(1u32.to_le_bytes());
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
pub fn place(offset: u64) -> u32 {
    (START_KERNEL_MAP + PREFERRED + DATA + offset) as u32
}

/// A bzImage that has nothing but a header and `payload`.
pub fn bzimage(payload: &[u8]) -> Vec<u8> {
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

pub fn zstd(file: &[u8]) -> Vec<u8> {
    with_length(zstd::bulk::compress(file, 1).unwrap(), file)
}

pub fn gzip(file: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(file).unwrap();
    encoder.finish().unwrap()
}

pub fn xz(file: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    liblzma::read::XzEncoder::new(file, 0)
        .read_to_end(&mut packed)
        .unwrap();
    with_length(packed, file)
}

pub fn lz4(file: &[u8]) -> Vec<u8> {
    let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
    for block in file.chunks(1 << 20) {
        let block = lz4_flex::block::compress(block);
        packed.extend((block.len() as u32).to_le_bytes());
        packed.extend(block);
    }
    with_length(packed, file)
}
