//! Buffers of the guest's kernel module (`resources/guest-module`): in any memory, and moved.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use crate::{
    Context, Failure, Result,
    common::pci::{Function, Mmio},
};

const CREATE: u64 = 0xc018_4601;
const MOVE: u64 = 0xc018_4602;
const WHERE: u64 = 0xc018_4603;
const RAM: u32 = 0;
const BAR: u32 = 1;
const RAW: u32 = 2;
const PAGE: u64 = 4096;

/// `struct fanlight_vram_range`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Range {
    kind: u32,
    device: u32,
    bar: u32,
    pad: u32,
    offset: u64,
    len: u64,
}

/// `struct fanlight_vram_buffer`.
#[derive(Default)]
#[repr(C)]
struct Request {
    fd: i32,
    count: u32,
    ranges: u64,
    distance: i32,
    pad: u32,
}

/// A buffer of the module.
#[derive(Debug)]
pub struct Buffer {
    module: File,
    dmabuf: File,
}

impl Buffer {
    /// Creates a buffer of consecutive ranges.
    pub fn create(ranges: &[Range]) -> Result<Self> {
        let module = File::options()
            .read(true)
            .write(true)
            .open("/dev/fanlight-vram");
        let module = module.context("cannot open /dev/fanlight-vram")?;
        let fd = call(&module, CREATE, -1, ranges).context("cannot make a buffer")?;
        // SAFETY: the module returned a new descriptor, and no other owner exists.
        let dmabuf = unsafe { OwnedFd::from_raw_fd(fd.fd) }.into();
        Ok(Self { module, dmabuf })
    }

    /// Moves the buffer's bytes to other ranges.
    pub fn move_to(&self, ranges: &[Range]) -> Result<()> {
        call(&self.module, MOVE, self.dmabuf.as_raw_fd(), ranges)
            .map(drop)
            .context("cannot move a buffer")
    }

    /// How many ranges are in BARs, and the importer's distance to them; -1 if it cannot reach them.
    pub fn whereabouts(&self) -> Result<(u32, i32)> {
        let answer = call(&self.module, WHERE, self.dmabuf.as_raw_fd(), &[]);
        let answer = answer.context("cannot ask where a buffer is")?;
        Ok((answer.count, answer.distance))
    }

    /// Maps the buffer.
    pub fn map(&self, len: u64) -> Result<Mmio> {
        Mmio::new(&self.dmabuf, 0, len).context("cannot map a buffer")
    }
}

impl AsFd for Buffer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dmabuf.as_fd()
    }
}

fn call(module: &File, request: u64, fd: i32, ranges: &[Range]) -> std::io::Result<Request> {
    let mut argument = Request {
        fd,
        count: ranges.len() as u32,
        ranges: ranges.as_ptr().expose_provenance() as u64,
        ..Default::default()
    };
    // SAFETY: the module reads the number of ranges that the count gives, and writes the request.
    match unsafe { libc::ioctl(module.as_raw_fd(), request as _, &raw mut argument) } {
        0 => Ok(argument),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Parses ranges, each of which is one of `ram,LEN`; `bar,IDS,BAR,OFFSET,LEN`; `pages,IDS,BAR,OFFSET,STEP,COUNT`
/// (single pages in mixed order); `raw,ADDRESS,LEN`. Numbers are hexadecimal.
pub fn parse(texts: &[&str]) -> Result<Vec<Range>> {
    let mut ranges = Vec::new();
    for text in texts {
        let words: Vec<_> = text.split(',').collect();
        match *words.as_slice() {
            ["ram", len] => ranges.push(Range {
                kind: RAM,
                len: number(len)?,
                ..Default::default()
            }),
            ["raw", address, len] => ranges.push(Range {
                kind: RAW,
                offset: number(address)?,
                len: number(len)?,
                ..Default::default()
            }),
            ["bar", ids, bar, offset, len] => ranges.push(Range {
                kind: BAR,
                device: device(ids)?,
                bar: number(bar)? as u32,
                offset: number(offset)?,
                len: number(len)?,
                pad: 0,
            }),
            ["pages", ids, bar, offset, step, count] => {
                let (device, bar) = (device(ids)?, number(bar)? as u32);
                let (offset, step, count) = (number(offset)?, number(step)?, number(count)?);
                ranges.extend(mixed(count).map(|page| Range {
                    kind: BAR,
                    device,
                    bar,
                    offset: offset + page * step,
                    len: PAGE,
                    pad: 0,
                }));
            }
            _ => return Err(Failure(format!("{text:?} is not a range"))),
        }
    }
    Ok(ranges)
}

/// 0 to `count` in an order in which no number follows its predecessor.
fn mixed(count: u64) -> impl Iterator<Item = u64> {
    /// Coprime to every count in use, so no number repeats.
    const STEP: u64 = 7;
    (0..count).map(move |index| index * STEP % count)
}

fn number(text: &str) -> Result<u64> {
    u64::from_str_radix(text, 16).context(format!("{text:?} is not a number"))
}

/// Bus, device and function in one number.
fn device(ids: &str) -> Result<u32> {
    let function = Function::only(ids)?;
    function.enable(true)?;
    let address = function.address();
    let words: Vec<_> = address.split([':', '.']).collect();
    match *words.as_slice() {
        [_, bus, device, function] => {
            Ok((number(bus)? << 8 | number(device)? << 3 | number(function)?) as u32)
        }
        _ => Err(Failure(format!("{address:?} is not an address"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_as_large_as_the_modules() {
        let size = |request: u64| (request >> 16 & 0x3fff) as usize;
        assert_eq!(size_of::<Request>(), size(CREATE));
        assert_eq!(size_of::<Range>(), 32);
    }

    #[test]
    fn ranges_are_read() {
        let ranges = parse(&["ram,2000", "raw,fec00000,1000"]).unwrap();
        let is: Vec<_> = ranges.iter().map(|r| (r.kind, r.offset, r.len)).collect();
        assert_eq!(is, [(RAM, 0, 0x2000), (RAW, 0xfec0_0000, 0x1000)]);
        assert!(parse(&["bar,1"]).is_err());
        let mut all: Vec<_> = mixed(300).collect();
        assert_ne!(all[1], all[0] + 1);
        all.sort_unstable();
        assert!(all.into_iter().eq(0..300));
    }
}
