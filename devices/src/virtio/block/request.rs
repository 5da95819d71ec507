//! One request of the driver (Virtio 1.3, 5.2.6): parsed, checked, answered.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian};

use super::disk::{DiskImage, SECTOR_SIZE};
use crate::{
    GuestMemory,
    virtio::{Buffers, QueueError, Request},
};

/// The most sectors of one discard or write-zeroes: more would take the host long, and drivers split.
pub const MAX_RANGE_SECTORS: u32 = (1 << 30) / SECTOR_SIZE as u32;
/// Ranges in one such request.
pub const MAX_RANGES: u32 = 16;

const VIRTIO_BLK_T_IN: u32 = 0;
const VIRTIO_BLK_T_OUT: u32 = 1;
const VIRTIO_BLK_T_FLUSH: u32 = 4;
const VIRTIO_BLK_T_GET_ID: u32 = 8;
const VIRTIO_BLK_T_DISCARD: u32 = 11;
const VIRTIO_BLK_T_WRITE_ZEROES: u32 = 13;

/// Flag of a write-zeroes range: the space may be given back.
const UNMAP: u32 = 1;
/// Length of the identity that GET_ID answers, padded with NULs.
const ID_LEN: usize = 20;

/// What the driver reads in the last byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    /// VIRTIO_BLK_S_OK
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR
    IoError = 1,
    /// VIRTIO_BLK_S_UNSUPP
    Unsupported = 2,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    kind: little_endian::U32,
    reserved: little_endian::U32,
    sector: little_endian::U64,
}

/// `struct virtio_blk_discard_write_zeroes`
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Range {
    sector: little_endian::U64,
    num_sectors: little_endian::U32,
    flags: little_endian::U32,
}

/// Handles a request; the result is how many bytes were written into it, status included.
pub fn handle(
    mem: &GuestMemory,
    queue: u16,
    mut request: Request,
    image: &DiskImage,
    serial: &str,
) -> Result<u32, QueueError> {
    let broken = |rule| QueueError::Driver { queue, rule };
    let mut header = [0; size_of::<Header>()];
    let front = request.readable.take_front(header.len() as u64);
    if front.len() != header.len() as u64 {
        return Err(broken("a block request is shorter than its header"));
    }
    front
        .read(mem, &mut header)
        .map_err(|_| broken("a block request's header cannot be read"))?;
    let header: Header = zerocopy::transmute!(header);
    let data_len = request
        .writable
        .len()
        .checked_sub(1)
        .ok_or(broken("a block request has no room for its status"))?;
    let input = request.writable.take_front(data_len);
    let status_byte = request.writable;

    let (status, written) = execute(mem, &header, &request.readable, &input, image, serial);
    status_byte
        .write(mem, &[status as u8])
        .map_err(|_| broken("a block request's status cannot be written"))?;
    Ok(u32::try_from(written + 1).unwrap_or(u32::MAX))
}

/// Does what the request asks; the status and how many bytes of `input` were written.
fn execute(
    mem: &GuestMemory,
    header: &Header,
    output: &Buffers,
    input: &Buffers,
    image: &DiskImage,
    serial: &str,
) -> (Status, u64) {
    let sector = header.sector.get();
    let result = match header.kind.get() {
        VIRTIO_BLK_T_IN => {
            let len = input.len();
            transfer(mem, sector, input, image, |slices, offset| {
                image.read(slices, offset)
            })
            .map(|()| len)
        }
        VIRTIO_BLK_T_OUT if image.is_readonly() => Err(Status::IoError),
        VIRTIO_BLK_T_OUT => transfer(mem, sector, output, image, |slices, offset| {
            image.write(slices, offset)
        })
        .map(|()| 0),
        VIRTIO_BLK_T_FLUSH => answer("flush", image.flush()).map(|()| 0),
        VIRTIO_BLK_T_GET_ID => {
            let mut id = [0; ID_LEN];
            for (to, from) in id.iter_mut().zip(serial.bytes()) {
                *to = from;
            }
            input
                .write(mem, &id)
                .map(|written| written as u64)
                .map_err(|_| Status::IoError)
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if image.is_readonly() => {
            Err(Status::IoError)
        }
        kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => {
            change_ranges(mem, kind, output, image).map(|()| 0)
        }
        _ => Err(Status::Unsupported),
    };
    match result {
        Ok(written) => (Status::Ok, written),
        Err(status) => (status, 0),
    }
}

fn answer(what: &str, result: std::io::Result<()>) -> Result<(), Status> {
    result.map_err(|error| {
        tracing::error!(%error, "the disk image failed to {what}");
        Status::IoError
    })
}

/// Where `sectors` of bytes from `sector` on start, if the disk has all of them.
fn byte_range(sector: u64, len: u64, image: &DiskImage) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR_SIZE).ok_or(Status::IoError)?;
    let end = offset.checked_add(len).ok_or(Status::IoError)?;
    if end > image.size() {
        return Err(Status::IoError);
    }
    Ok(offset)
}

fn transfer(
    mem: &GuestMemory,
    sector: u64,
    buffers: &Buffers,
    image: &DiskImage,
    go: impl FnOnce(&[vm_memory::VolatileSlice<'_>], u64) -> std::io::Result<()>,
) -> Result<(), Status> {
    let len = buffers.len();
    if !len.is_multiple_of(SECTOR_SIZE) {
        return Err(Status::IoError);
    }
    let offset = byte_range(sector, len, image)?;
    if len == 0 {
        return Ok(());
    }
    let slices = buffers.slices(mem).map_err(|_| Status::IoError)?;
    answer("transfer data", go(&slices, offset))
}

/// DISCARD and WRITE_ZEROES: all ranges are checked before the first is changed.
fn change_ranges(
    mem: &GuestMemory,
    kind: u32,
    output: &Buffers,
    image: &DiskImage,
) -> Result<(), Status> {
    const RANGE: u64 = size_of::<Range>() as u64;
    let count = output.len() / RANGE;
    if !output.len().is_multiple_of(RANGE) || count == 0 || count > u64::from(MAX_RANGES) {
        return Err(Status::IoError);
    }
    let mut bytes = vec![0; output.len() as usize];
    output.read(mem, &mut bytes).map_err(|_| Status::IoError)?;
    let allowed = if kind == VIRTIO_BLK_T_WRITE_ZEROES {
        UNMAP
    } else {
        0
    };
    let mut changes = Vec::with_capacity(count as usize);
    for bytes in bytes.chunks_exact(RANGE as usize) {
        let range = Range::read_from_bytes(bytes).map_err(|_| Status::IoError)?;
        let (sectors, flags) = (range.num_sectors.get(), range.flags.get());
        if flags & !allowed != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > MAX_RANGE_SECTORS {
            return Err(Status::IoError);
        }
        let len = u64::from(sectors) * SECTOR_SIZE;
        let offset = byte_range(range.sector.get(), len, image)?;
        changes.push((offset, len, flags & UNMAP != 0));
    }
    for (offset, len, unmap) in changes {
        let result = if kind == VIRTIO_BLK_T_WRITE_ZEROES {
            image.write_zeroes(offset, len, unmap)
        } else {
            image.discard(offset, len)
        };
        answer("change a range", result)?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
