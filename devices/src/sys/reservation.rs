//! Address space reserved without access (`PROT_NONE`), into which files are mapped.

use std::{ffi::c_void, fs::File, io, mem, ops::Range, ptr};

use rustix::{
    io::Errno,
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap},
    rand::{GetRandomFlags, getrandom},
};

/// Addresses that Linux gives to no mapping that does not ask for them (`arch/x86/mm/mmap.c`).
///
/// Mappings get the highest free range below the stack. Without a stack limit, they get the highest one below a
/// sixth of the address space, 21.3 TiB. If that is full, or in the legacy layout, they get the lowest above a
/// third, 42.7 TiB. Programs and their heaps lie above that or far below.
const ISOLATED: Range<u64> = 24 << 40..40 << 40;
/// Alignment of an isolated reservation: that of a huge page, which KVM maps only where both addresses have it.
const ISOLATED_ALIGN: u64 = 2 << 20;
/// Random addresses tried for an isolated reservation, of millions.
const ISOLATED_TRIES: usize = 16;

const FLAGS: MapFlags = MapFlags::PRIVATE.union(MapFlags::NORESERVE);

/// A reserved range of host-virtual addresses. Dropping unmaps it, with all that is mapped in it.
#[derive(Debug)]
pub struct Reservation {
    start: *mut c_void,
    len: usize,
}

// SAFETY: the range belongs to the value, which hands its addresses to the kernel only, from any thread.
unsafe impl Send for Reservation {}
// SAFETY: as above; shared references change nothing but mappings, which the kernel serialises.
unsafe impl Sync for Reservation {}

impl Reservation {
    /// Reserves `len` bytes where the kernel likes.
    pub fn new(len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address that the kernel chooses, without access.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), len, ProtFlags::empty(), FLAGS) }?;
        Ok(Self { start, len })
    }

    /// Reserves `len` bytes at a multiple of `align`, a power of two and at least a page.
    pub fn aligned(len: usize, align: usize) -> io::Result<Self> {
        let with_slack = len.checked_add(align).ok_or(Errno::NOMEM)?;
        let whole = Self::new(with_slack)?;
        let address = whole.start.addr();
        let (_, rest) = whole.split_at(address.next_multiple_of(align) - address);
        let (aligned, _) = rest.split_at(len);
        Ok(aligned)
    }

    /// Reserves `len` bytes, whole pages, where no mapping comes to lie that does not ask for the address. A part
    /// that is unmapped by accident stays free.
    pub fn isolated(len: u64) -> io::Result<Self> {
        let room = ISOLATED.end - ISOLATED.start;
        let choices = room.checked_sub(len).ok_or(Errno::NOMEM)? / ISOLATED_ALIGN + 1;
        let len = usize::try_from(len).map_err(io::Error::other)?;
        for _ in 0..ISOLATED_TRIES {
            let mut random = [0; 8];
            getrandom(&mut random, GetRandomFlags::empty())?;
            let index = u64::from_ne_bytes(random) % choices;
            let address = ISOLATED.start + index * ISOLATED_ALIGN;
            let address = ptr::without_provenance_mut(address as usize);
            let flags = FLAGS.union(MapFlags::FIXED_NOREPLACE);
            // SAFETY: a new mapping without access, which replaces none.
            match unsafe { mmap_anonymous(address, len, ProtFlags::empty(), flags) } {
                Err(Errno::EXIST) => {}
                start => {
                    let start = start?;
                    return Ok(Self { start, len });
                }
            }
        }
        Err(Errno::EXIST.into())
    }

    /// Two reservations: the first `at` bytes, whole pages, and the rest.
    pub fn split_at(self, at: usize) -> (Self, Self) {
        let at = at.min(self.len);
        let whole = mem::ManuallyDrop::new(self);
        let part = |start, len| Self { start, len };
        let rest = whole.start.wrapping_byte_add(at);
        (part(whole.start, at), part(rest, whole.len - at))
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The address of the byte at `offset`.
    pub fn address(&self, offset: u64) -> *mut c_void {
        self.start.wrapping_byte_add(offset as usize)
    }

    /// Maps `len` bytes of `file` from `file_offset` at `offset`, shared with other processes.
    ///
    /// If it fails, the range may be unmapped: Linux before 6.12 removes the reservation before it asks the file.
    /// [`Reservation::is_intact`] tells.
    pub fn map(
        &self,
        offset: u64,
        len: u64,
        file: &File,
        file_offset: u64,
        writable: bool,
    ) -> io::Result<()> {
        let (at, len) = self.range(offset, len)?;
        let access = if writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: within the reservation, which belongs to this value and which nothing in this process refers to.
        unsafe { mmap(at, len, access, flags, file, file_offset) }?;
        Ok(())
    }

    /// Removes what is mapped in a range, which is reserved again.
    pub fn unmap(&self, offset: u64, len: u64) -> io::Result<()> {
        let (at, len) = self.range(offset, len)?;
        let flags = FLAGS.union(MapFlags::FIXED);
        // SAFETY: within the reservation, which belongs to this value and which nothing in this process refers to.
        unsafe { mmap_anonymous(at, len, ProtFlags::empty(), flags) }?;
        Ok(())
    }

    /// Whether something is mapped at, or reserved for, each page of a range.
    pub fn is_intact(&self, offset: u64, len: u64) -> bool {
        let Ok((at, len)) = self.range(offset, len) else {
            return false;
        };
        // Changes nothing, and fails where a page is not mapped.
        // SAFETY: the advice is what holds already.
        unsafe { madvise(at, len, Advice::Normal) }.is_ok()
    }

    /// A range as an address and a length, if it lies within the reservation.
    fn range(&self, offset: u64, len: u64) -> io::Result<(*mut c_void, usize)> {
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > self.len as u64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok((self.address(offset), len as usize))
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.len == 0 {
            return;
        }
        // SAFETY: the range belongs to this value. Users of its addresses are dropped before it.
        if let Err(error) = unsafe { munmap(self.start, self.len) } {
            tracing::error!(%error, "cannot unmap reserved addresses");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const PAGE: u64 = 4096;

    /// Where the mappings of a program start, as it tells itself.
    fn mappings_of(command: &str) -> Vec<u64> {
        let output = Command::new("sh").args(["-c", command]).output().unwrap();
        assert!(output.status.success(), "{command}: {output:?}");
        let maps = String::from_utf8(output.stdout).unwrap();
        let starts = maps.lines().filter_map(|line| line.split('-').next());
        let starts = starts.map(|start| u64::from_str_radix(start, 16).unwrap());
        starts.collect()
    }

    #[test]
    fn linux_puts_nothing_into_the_isolated_range() {
        let reservation = Reservation::isolated(1 << 30).unwrap();
        let start = reservation.address(0).addr() as u64;
        assert!(ISOLATED.contains(&start) && ISOLATED.contains(&(start + (1 << 30) - 1)));
        assert!(Reservation::isolated(1 << 60).is_err());
        // Where the stack limit cannot be raised, the second layout is the first again.
        let layouts = [
            "cat /proc/self/maps",
            "ulimit -s unlimited 2>/dev/null; cat /proc/self/maps",
            "setarch -L cat /proc/self/maps",
        ];
        for command in layouts {
            for _ in 0..8 {
                let starts = mappings_of(command);
                assert!(starts.len() > 4);
                // The next mapping comes to lie below the existing ones.
                let near = ISOLATED.start..ISOLATED.end + (1 << 40);
                let found = starts.iter().find(|start| near.contains(start));
                assert_eq!(found, None, "{command}: {found:x?}");
            }
        }
    }

    #[test]
    fn a_reservation_is_aligned_and_split() {
        let reservation = Reservation::aligned(0x5000, 1 << 30).unwrap();
        assert_eq!(reservation.address(0).addr() % (1 << 30), 0);
        let (first, second) = reservation.split_at(0x2000);
        assert_eq!((first.len(), second.len()), (0x2000, 0x3000));
        assert_eq!(first.address(0x2000), second.address(0));
        drop(first);
        assert!(second.is_intact(0, 0x3000));
    }

    #[test]
    fn files_are_mapped_within_the_reservation_only() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * PAGE).unwrap();
        let reservation = Reservation::new(2 * PAGE as usize).unwrap();
        reservation.map(PAGE, PAGE, &file, 3 * PAGE, true).unwrap();
        assert!(reservation.map(PAGE, 2 * PAGE, &file, 0, true).is_err());
        assert!(reservation.map(u64::MAX, PAGE, &file, 0, true).is_err());
        assert!(reservation.unmap(2 * PAGE, PAGE).is_err());
        reservation.unmap(0, 2 * PAGE).unwrap();
        assert!(reservation.is_intact(0, 2 * PAGE));
        assert!(!reservation.is_intact(PAGE, 2 * PAGE));
    }
}
