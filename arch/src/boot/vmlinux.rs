//! An x86-64 kernel as an ELF file (ELF-64 object file format 1.5): its headers, and placing its
//! segments within memory that already holds the file.

use std::ops::Range;

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr};
use thiserror::Error;

const PT_LOAD: u32 = 1;
/// ELFMAG, ELFCLASS64, ELFDATA2LSB.
const IDENT: &[u8] = b"\x7fELF\x02\x01";
const EM_X86_64: u16 = 62;
/// A kernel has a handful of segments.
const MAX_SEGMENTS: usize = 32;

/// Why a file is not a kernel that can be placed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ElfError {
    /// Another format or another machine.
    #[error("it is not an ELF file for x86-64")]
    NotX86,
    /// None, or too many to believe.
    #[error("it has {0} segments")]
    Segments(usize),
    /// The table of segments is not in the file.
    #[error("its program headers lie outside of it")]
    Headers,
    /// A segment is not in the file, or not in the memory that the kernel asks for.
    #[error("a segment lies outside of it")]
    OutsideImage,
    /// Segments lie on one another, or in another order than in the file.
    #[error("its segments overlap")]
    Overlap,
}

/// Reads the header of an ELF file for x86-64.
pub fn header(file: &[u8]) -> Result<Elf64_Ehdr, ElfError> {
    read_at::<Elf64_Ehdr>(file, 0)
        .filter(|header| header.e_ident.starts_with(IDENT) && header.e_machine == EM_X86_64)
        .ok_or(ElfError::NotX86)
}

/// Reads a plain structure at an offset that the file gives.
fn read_at<T: vm_memory::ByteValued + Default>(bytes: &[u8], offset: usize) -> Option<T> {
    let mut value = T::default();
    let from = bytes.get(offset..offset.checked_add(size_of::<T>())?)?;
    value.as_mut_slice().copy_from_slice(from);
    Some(value)
}

/// What must be known of a file to place it.
#[derive(Debug)]
pub struct Vmlinux {
    /// Physical address of the entry, as linked.
    pub entry: u64,
    /// End of the file proper, within the bytes given; relocations follow.
    pub end: usize,
    segments: Vec<Elf64_Phdr>,
}

impl Vmlinux {
    /// Reads the headers; `file` may be longer than the ELF file.
    pub fn parse(file: &[u8]) -> Result<Self, ElfError> {
        let header = header(file)?;
        let count = usize::from(header.e_phnum);
        if count == 0 || count > MAX_SEGMENTS {
            return Err(ElfError::Segments(count));
        }
        let segments: Vec<Elf64_Phdr> = (0..count)
            .map(|index| {
                let table = usize::try_from(header.e_phoff).ok()?;
                read_at(file, table.checked_add(index * size_of::<Elf64_Phdr>())?)
            })
            .collect::<Option<_>>()
            .ok_or(ElfError::Headers)?;
        let sections = header
            .e_shoff
            .saturating_add(u64::from(header.e_shnum) * u64::from(header.e_shentsize));
        let end = segments
            .iter()
            .map(|segment| segment.p_offset.saturating_add(segment.p_filesz))
            .fold(sections, u64::max);
        Ok(Self {
            entry: header.e_entry,
            end: usize::try_from(end).map_or(file.len(), |end| end.min(file.len())),
            segments: segments
                .into_iter()
                .filter(|segment| segment.p_type == PT_LOAD)
                .collect(),
        })
    }

    /// The physical addresses, as linked, that the segments span.
    pub fn physical_range(&self) -> Range<u64> {
        let starts = self.segments.iter().map(|segment| segment.p_paddr);
        let ends = self
            .segments
            .iter()
            .map(|segment| segment.p_paddr.saturating_add(segment.p_memsz));
        starts.min().unwrap_or(0)..ends.max().unwrap_or(0)
    }

    /// Moves the segments to their places, where they are not there already. `area` starts with the
    /// `file_len` bytes of the file and is clear behind them; the image, linked at `preferred`, goes to
    /// `base` in it. What lies in no segment is cleared: the kernel's bss is such memory.
    pub fn place(
        &self,
        area: &mut [u8],
        base: usize,
        preferred: u64,
        file_len: usize,
    ) -> Result<(), ElfError> {
        let mut moves = self
            .segments
            .iter()
            .map(|segment| Move::new(segment, area.len(), base, preferred, file_len))
            .collect::<Option<Vec<_>>>()
            .ok_or(ElfError::OutsideImage)?;
        moves.sort_by_key(|segment| segment.from);
        if moves
            .windows(2)
            .any(|pair| pair[0].to + pair[0].len > pair[1].to)
        {
            return Err(ElfError::Overlap);
        }
        // Segments are in the same order in the file as in memory: moving those that go down from the
        // first on, and then those that go up from the last on, overwrites none still to be moved.
        for &Move { from, to, len } in moves.iter().filter(|m| m.to < m.from) {
            area.copy_within(from..from + len, to);
        }
        for &Move { from, to, len } in moves.iter().rev().filter(|m| m.to > m.from) {
            area.copy_within(from..from + len, to);
        }
        let mut at = 0;
        for &Move { to, len, .. } in &moves {
            area[at..to].fill(0);
            at = to + len;
        }
        if let Some(rest) = area.get_mut(at..file_len) {
            rest.fill(0);
        }
        Ok(())
    }
}

/// A segment's way, in offsets of the area: all of it lies in there, and `from` in the file.
#[derive(Clone, Copy, Debug)]
struct Move {
    from: usize,
    to: usize,
    len: usize,
}

impl Move {
    fn new(
        segment: &Elf64_Phdr,
        area_len: usize,
        base: usize,
        preferred: u64,
        file_len: usize,
    ) -> Option<Self> {
        let offset = usize::try_from(segment.p_paddr.checked_sub(preferred)?).ok()?;
        let to = base.checked_add(offset)?;
        let from = usize::try_from(segment.p_offset).ok()?;
        let len = usize::try_from(segment.p_filesz).ok()?;
        let mem_len = usize::try_from(segment.p_memsz).ok()?.max(len);
        let in_file = from.checked_add(len)? <= file_len;
        let in_area = to.checked_add(mem_len)? <= area_len;
        (in_file && in_area).then_some(Self { from, to, len })
    }
}
