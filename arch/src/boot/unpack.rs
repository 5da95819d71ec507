//! Unpacks a bzImage on the host and does what the code in front of the kernel would do in the guest:
//! decompress, place, relocate (Linux `arch/x86/boot/compressed/misc.c`, `kaslr.c`).
//!
//! The guest would decompress on one cold vCPU with every page a fault; here the decoder writes
//! straight to where the segments belong. What that code does besides is not needed here: the boot
//! parameters are clean already, page tables and their depth are those that the vCPU starts with (four
//! levels), and there is no encrypted memory to accept.

use std::{path::Path, time::Instant};

use super::{
    LoadError,
    bzimage::BzImage,
    image::with_bytes,
    kaslr::{Kaslr, MIN_PHYSICAL_BASE, random_base, random_virtual_offset},
    payload::Payload,
    populate::Populate,
    relocations::{self, Relocations},
    vmlinux::Vmlinux,
};
use crate::GuestMemory;

/// Where x86-64 kernels have their first segment, by the alignment of segments: 2 MiB into the file.
/// Where that is wrong, the segments are moved.
const SEGMENT_OFFSET: u64 = 2 << 20;
/// `MIN_KERNEL_ALIGN`: the kernel maps itself with pages of 2 MiB.
const KERNEL_PAGE: u64 = 2 << 20;
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

/// Unpacks `image` below `room_end`. `None`: the format is not known here, or there is no room to
/// unpack; the guest can do it itself.
pub fn load(
    mem: &GuestMemory,
    path: &Path,
    image: &BzImage,
    room_end: u64,
    kaslr: Kaslr,
    populate: &Populate,
) -> Result<Option<Unpacked>, LoadError> {
    let started = Instant::now();
    let Some(bytes) = image.payload()? else {
        return Ok(None);
    };
    let Some(payload) = Payload::new(&bytes) else {
        tracing::info!("the kernel's compression is not one that is unpacked on the host");
        return Ok(None);
    };
    let (format, unpacked_len) = (payload.format, payload.unpacked_len);
    let bad = |problem: String| LoadError::BadKernel {
        path: path.into(),
        problem: format!(
            "its {format:?} payload is corrupt: {problem}; copy or install the kernel again"
        ),
    };
    if unpacked_len > MAX_UNPACKED {
        return Err(bad(format!("it claims to unpack to {unpacked_len} bytes")));
    }

    let header = &image.header;
    let preferred = header.pref_address;
    let span = u64::from(header.init_size)
        .max(unpacked_len as u64)
        .next_multiple_of(KERNEL_PAGE);
    let alignment = u64::from(header.kernel_alignment);
    let kaslr = match header.relocatable_kernel {
        0 => Kaslr::Off,
        _ => kaslr,
    };
    let base = match kaslr {
        Kaslr::Full => random_base(alignment, span, room_end),
        Kaslr::Virtual | Kaslr::Off => {
            (preferred >= MIN_PHYSICAL_BASE && preferred + span <= room_end).then_some(preferred)
        }
    };
    let Some(base) = base else { return Ok(None) };

    let output_at = base - SEGMENT_OFFSET;
    let area_len = (SEGMENT_OFFSET + span) as usize;
    populate.kernel(output_at..base + span, mem);
    let decoded = with_bytes(mem, output_at, unpacked_len, |output| {
        payload.decode(output)
    })?;
    decoded.map_err(|error| bad(error.to_string()))?;
    let decoded_in = started.elapsed();

    let (entry, randomized) = with_bytes(mem, output_at, area_len, |area| {
        let offset =
            (kaslr != Kaslr::Off).then(|| random_virtual_offset(alignment, span, preferred));
        finish(area, unpacked_len, preferred, offset)
    })?
    .map_err(bad)?;
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

/// Makes an image out of the file of `file_len` bytes that `area` starts with: at [`SEGMENT_OFFSET`], and
/// with every virtual address moved by `offset` if the kernel says where those are. Returns the entry's
/// distance from the image's start, and whether addresses were moved.
fn finish(
    area: &mut [u8],
    file_len: usize,
    preferred: u64,
    offset: Option<u64>,
) -> Result<(u64, bool), String> {
    let file = &area[..file_len];
    let kernel = Vmlinux::parse(file).map_err(|error| error.to_string())?;
    let entry = kernel
        .entry
        .checked_sub(preferred)
        .filter(|&entry| entry < area.len() as u64 - SEGMENT_OFFSET)
        .ok_or("its entry lies outside of it")?;
    let words = relocations::words(&file[kernel.end..]);
    kernel
        .place(area, SEGMENT_OFFSET as usize, preferred, file_len)
        .map_err(|error| error.to_string())?;
    match offset.zip(Relocations::new(&words)) {
        Some((offset, relocations)) => {
            relocations
                .apply(&mut area[SEGMENT_OFFSET as usize..], preferred, offset)
                .map_err(|error| error.to_string())?;
            Ok((entry, true))
        }
        None => Ok((entry, false)),
    }
}

#[cfg(test)]
#[path = "unpack_tests.rs"]
mod tests;
