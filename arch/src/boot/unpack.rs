//! Unpacks a bzImage on the host and does what the code in front of the kernel would do in the guest:
//! decompress, place, relocate (Linux `arch/x86/boot/compressed/misc.c`, `kaslr.c`).
//!
//! The guest would decompress on one cold vCPU with every page a fault; here the decoder writes
//! straight to where the segments belong.

use std::{io::Read, path::Path, time::Instant};

use super::{LoadError, bzimage::BzImage, image::with_bytes};
use crate::{GuestMemory, layout};

/// `KERNEL_IMAGE_SIZE` of a kernel that randomizes its base: how far its mapping reaches.
const KERNEL_IMAGE_SIZE: u64 = 1 << 30;
/// `__START_KERNEL_map`: virtual address of physical address 0 in the kernel's mapping.
const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// `MIN_KERNEL_LOAD`-like floor for random physical bases: below it lie the loader's own tables, and
/// the decompressed file's header in front of the first segment must find room.
const MIN_PHYSICAL_BASE: u64 = 16 << 20;
/// More than any kernel decompresses to; a corrupt length must not be believed.
const MAX_UNPACKED: usize = 1 << 30;

/// A kernel that is in place.
#[derive(Debug, PartialEq, Eq)]
pub struct Unpacked {
    /// Guest-physical address of `startup_64`.
    pub entry: u64,
    /// Whether it was moved to a random place.
    pub randomized: bool,
}

/// Unpacks `image` below `room_end`. `None`: the format is not one of ours, or there is no room to
/// unpack; the guest can do it itself.
pub fn load(
    mem: &GuestMemory,
    path: &Path,
    image: &BzImage,
    room_end: u64,
    randomize: bool,
) -> Result<Option<Unpacked>, LoadError> {
    let Some(payload) = image.payload()? else {
        return Ok(None);
    };
    let Some((format, packed, unpacked_len)) = Format::of(&payload) else {
        tracing::info!("the kernel's compression is not one that is unpacked on the host");
        return Ok(None);
    };
    let bad = |problem: &str| LoadError::BadKernel {
        path: path.into(),
        problem: format!("its {format:?} payload is corrupt: {problem}"),
    };
    if unpacked_len < size_of::<Ehdr>() || unpacked_len > MAX_UNPACKED {
        return Err(bad("the length at its end is absurd"));
    }

    let header = &image.header;
    let preferred = header.pref_address;
    let span = u64::from(header.init_size).max(unpacked_len as u64);
    let alignment = u64::from(header.kernel_alignment);
    let movable = randomize && header.relocatable_kernel != 0;
    let base = if movable {
        random_base(alignment, span, room_end)
    } else {
        (preferred >= MIN_PHYSICAL_BASE && preferred + span <= room_end).then_some(preferred)
    };
    let Some(base) = base else { return Ok(None) };

    // The first segment's offset in the file is known only once the file is there, but every x86-64
    // kernel puts it at the alignment of its segments: where that is wrong, the segment is moved.
    let guess = SEGMENT_OFFSET.min(base - layout::HIGH_MEMORY);
    let output_at = base - guess;
    let started = Instant::now();
    let decoded = with_bytes(mem, output_at, unpacked_len, |output| {
        format.decode(packed, output)
    })?;
    decoded.map_err(|error| bad(&error))?;
    drop(payload);
    let decoded_in = started.elapsed();

    let result = with_bytes(mem, output_at, guess as usize + span as usize, |area| {
        let kernel = Elf::parse(&area[..unpacked_len])?;
        let relocations = Relocations::parse(&area[kernel.end.min(unpacked_len)..unpacked_len]);
        kernel.place(area, guess as usize, preferred, unpacked_len)?;
        let image_area = &mut area[guess as usize..];
        let offset = match relocations {
            Some(relocations) if movable => {
                let offset = random_virtual_offset(alignment, span, preferred);
                relocations.apply(image_area, preferred, offset)?;
                Some(offset)
            }
            _ => None,
        };
        let entry = kernel
            .entry
            .checked_sub(preferred)
            .filter(|&entry| entry < span)
            .ok_or("its entry lies outside of it")?;
        Ok((entry, offset.is_some()))
    })?;
    let (entry, randomized) = result.map_err(|error: &str| bad(error))?;
    tracing::info!(
        ?format,
        bytes = unpacked_len,
        decode = ?decoded_in,
        total = ?started.elapsed(),
        randomized,
        "unpacked the kernel"
    );
    Ok(Some(Unpacked {
        entry: base + entry,
        randomized,
    }))
}

/// Where every x86-64 kernel has its first segment: 2 MiB into the file.
const SEGMENT_OFFSET: u64 = 2 << 20;

/// A random number below `bound`, which is not 0. The bias is below 2⁻³².
fn random_below(bound: u64) -> u64 {
    let mut bytes = [0; 8];
    // The flags ask for what is ready at once, which is everything once the host has booted; before,
    // the kernel stays where it would be without randomization.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::NONBLOCK);
    u64::from_le_bytes(bytes) % bound
}

/// A place for `span` bytes between [`MIN_PHYSICAL_BASE`] and `room_end`.
fn random_base(alignment: u64, span: u64, room_end: u64) -> Option<u64> {
    let first = MIN_PHYSICAL_BASE.next_multiple_of(alignment);
    let slots = room_end.checked_sub(first)?.checked_sub(span)? / alignment + 1;
    Some(first + random_below(slots) * alignment)
}

/// What to add to every virtual address: like `find_random_virt_addr`, independent of the base.
fn random_virtual_offset(alignment: u64, span: u64, preferred: u64) -> u64 {
    let room = KERNEL_IMAGE_SIZE
        .saturating_sub(preferred)
        .saturating_sub(span);
    random_below(room / alignment + 1) * alignment
}

/// Compression of the payload, told by its first bytes (Linux `lib/decompress.c`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Zstd,
    Gzip,
    Xz,
    Lz4,
}

impl Format {
    /// The format, the compressed bytes, and how many bytes they stand for: the kernel's build appends
    /// the length to formats that do not carry it; gzip's own last field is the same.
    fn of(payload: &[u8]) -> Option<(Self, &[u8], usize)> {
        let (format, has_own_length) = match payload {
            [0x28, 0xb5, 0x2f, 0xfd, ..] => (Self::Zstd, false),
            [0x1f, 0x8b, ..] => (Self::Gzip, true),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => (Self::Xz, false),
            [0x02, 0x21, 0x4c, 0x18, ..] => (Self::Lz4, false),
            _ => return None,
        };
        let (body, length) = payload.split_last_chunk()?;
        let packed = if has_own_length { payload } else { body };
        Some((format, packed, u32::from_le_bytes(*length) as usize))
    }

    /// Decodes `packed` into all of `output`.
    fn decode(self, packed: &[u8], output: &mut [u8]) -> Result<(), String> {
        let expected = output.len();
        let written = match self {
            Self::Zstd => zstd::zstd_safe::decompress(output, packed)
                .map_err(|code| zstd::zstd_safe::get_error_name(code).to_owned())?,
            Self::Gzip => fill(flate2::read::GzDecoder::new(packed), output)?,
            Self::Xz => fill(liblzma::read::XzDecoder::new(packed), output)?,
            Self::Lz4 => lz4_legacy(packed, output)?,
        };
        if written == expected {
            Ok(())
        } else {
            Err(format!("it has {written} bytes, not {expected}"))
        }
    }
}

fn fill(mut reader: impl Read, output: &mut [u8]) -> Result<usize, String> {
    let mut written = 0;
    while written < output.len() {
        match reader.read(&mut output[written..]) {
            Ok(0) => break,
            Ok(read) => written += read,
            Err(error) => return Err(error.to_string()),
        }
    }
    Ok(written)
}

/// LZ4's legacy frame: blocks with a length in front, each of up to 8 MiB decompressed.
fn lz4_legacy(packed: &[u8], output: &mut [u8]) -> Result<usize, String> {
    const MAGIC_LEN: usize = 4;
    let mut rest = packed.get(MAGIC_LEN..).unwrap_or_default();
    let mut written = 0;
    while let Some((len, after)) = rest.split_first_chunk() {
        let len = u32::from_le_bytes(*len) as usize;
        let block = after.get(..len).ok_or("a block is cut off")?;
        written += lz4_flex::block::decompress_into(block, &mut output[written..])
            .map_err(|error| error.to_string())?;
        rest = &after[len..];
    }
    Ok(written)
}

/// ELF header of 64-bit files, the fields that matter.
type Ehdr = linux_loader::elf::Elf64_Ehdr;
type Phdr = linux_loader::elf::Elf64_Phdr;
const PT_LOAD: u32 = 1;
/// Segments of a kernel: a handful.
const MAX_SEGMENTS: usize = 32;

/// What must be known of the decompressed file.
#[derive(Debug)]
struct Elf {
    /// Physical address of the entry, as linked.
    entry: u64,
    /// End of the file proper; relocations follow.
    end: usize,
    segments: Vec<Phdr>,
}

/// Reads a plain structure at an offset that the file gives.
fn read_at<T: vm_memory::ByteValued + Default>(bytes: &[u8], offset: usize) -> Option<T> {
    let mut value = T::default();
    let from = bytes.get(offset..offset.checked_add(size_of::<T>())?)?;
    value.as_mut_slice().copy_from_slice(from);
    Some(value)
}

impl Elf {
    fn parse(file: &[u8]) -> Result<Self, &'static str> {
        let header: Ehdr = read_at(file, 0).ok_or("it is too short")?;
        if &header.e_ident[..5] != b"\x7fELF\x02" {
            return Err("it is not a 64-bit ELF file");
        }
        let count = usize::from(header.e_phnum);
        if count == 0 || count > MAX_SEGMENTS {
            return Err("it has an absurd number of segments");
        }
        let segments: Vec<Phdr> = (0..count)
            .map(|index| {
                let table = usize::try_from(header.e_phoff).ok()?;
                read_at(file, table.checked_add(index * size_of::<Phdr>())?)
            })
            .collect::<Option<_>>()
            .ok_or("its program headers lie outside of it")?;
        let sections = header
            .e_shoff
            .saturating_add(u64::from(header.e_shnum) * u64::from(header.e_shentsize));
        let end = segments
            .iter()
            .map(|s| s.p_offset.saturating_add(s.p_filesz))
            .fold(sections, u64::max);
        Ok(Self {
            entry: header.e_entry,
            end: usize::try_from(end).unwrap_or(usize::MAX),
            segments: segments
                .into_iter()
                .filter(|segment| segment.p_type == PT_LOAD)
                .collect(),
        })
    }

    /// Moves the segments to their places. `area` starts with the file; the image, linked at
    /// `preferred`, goes to `base` in it. What lies in no segment is zeroed, as memory is.
    fn place(
        &self,
        area: &mut [u8],
        base: usize,
        preferred: u64,
        file_len: usize,
    ) -> Result<(), &'static str> {
        const OUTSIDE: &str = "a segment lies outside of it";
        let mut moves = Vec::with_capacity(self.segments.len());
        for segment in &self.segments {
            let to = segment
                .p_paddr
                .checked_sub(preferred)
                .and_then(|offset| usize::try_from(offset).ok())
                .and_then(|offset| base.checked_add(offset))
                .ok_or(OUTSIDE)?;
            let from = usize::try_from(segment.p_offset).map_err(|_| OUTSIDE)?;
            let len = usize::try_from(segment.p_filesz).map_err(|_| OUTSIDE)?;
            let mem_len = usize::try_from(segment.p_memsz).map_err(|_| OUTSIDE)?;
            let in_file = from.checked_add(len).is_some_and(|end| end <= file_len);
            let in_area = to
                .checked_add(mem_len.max(len))
                .is_some_and(|end| end <= area.len());
            if !in_file || !in_area {
                return Err(OUTSIDE);
            }
            moves.push((from, to, len));
        }
        // Segments are in the order of their addresses in the file as in memory: moving the one that
        // goes up from the last on, and those that go down from the first on, overwrites none that is
        // still to be moved.
        moves.sort_by_key(|(from, ..)| *from);
        if moves
            .windows(2)
            .any(|pair| pair[0].1 + pair[0].2 > pair[1].1)
        {
            return Err("its segments overlap");
        }
        for &(from, to, len) in moves.iter().filter(|(from, to, _)| to < from) {
            area.copy_within(from..from + len, to);
        }
        for &(from, to, len) in moves.iter().rev().filter(|(from, to, _)| to > from) {
            area.copy_within(from..from + len, to);
        }
        let mut at = 0;
        for &(_, to, len) in &moves {
            area[at..to].fill(0);
            at = to + len;
        }
        if at < file_len {
            area[at..file_len].fill(0);
        }
        Ok(())
    }
}

/// The lists of places that hold addresses, as `arch/x86/tools/relocs.c` writes them behind the
/// kernel: each starts with a 0; 64-bit ones first, then (before Linux 6.15) those that are
/// subtracted, then 32-bit ones. An entry is a virtual address, 32 bits of it, sign-extended.
#[derive(Debug, Default, PartialEq, Eq)]
struct Relocations {
    add64: Vec<i32>,
    subtract32: Vec<i32>,
    add32: Vec<i32>,
}

impl Relocations {
    /// `None` if there are none: the kernel cannot be moved.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let words: Vec<i32> = bytes
            .as_chunks()
            .0
            .iter()
            .map(|word| i32::from_le_bytes(*word))
            .collect();
        let first = words.iter().position(|&word| word == 0)?;
        let mut lists = words[first + 1..].split(|&word| word == 0);
        let add64 = lists.next()?.to_vec();
        let (subtract32, add32) = match (lists.next()?, lists.next()) {
            (add32, None) => (Vec::new(), add32.to_vec()),
            (subtract32, Some(add32)) => (subtract32.to_vec(), add32.to_vec()),
        };
        Some(Self {
            add64,
            subtract32,
            add32,
        })
    }

    /// Adds `offset` to every address in `image`, which is linked at physical `preferred`.
    fn apply(&self, image: &mut [u8], preferred: u64, offset: u64) -> Result<(), &'static str> {
        const OUTSIDE: &str = "a relocation lies outside of it";
        let start = START_KERNEL_MAP.wrapping_add(preferred);
        let place = |address: i32| (i64::from(address) as u64).wrapping_sub(start) as usize;
        for &address in &self.add64 {
            let value: &mut [u8; 8] = image
                .get_mut(place(address)..)
                .and_then(<[u8]>::first_chunk_mut)
                .ok_or(OUTSIDE)?;
            *value = u64::from_le_bytes(*value)
                .wrapping_add(offset)
                .to_le_bytes();
        }
        for (list, delta) in [
            (&self.add32, offset as u32),
            (&self.subtract32, (offset as u32).wrapping_neg()),
        ] {
            for &address in list {
                let value: &mut [u8; 4] = image
                    .get_mut(place(address)..)
                    .and_then(<[u8]>::first_chunk_mut)
                    .ok_or(OUTSIDE)?;
                *value = u32::from_le_bytes(*value).wrapping_add(delta).to_le_bytes();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "unpack_tests.rs"]
mod tests;
