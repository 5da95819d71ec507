//! A place in the address space to which nothing else comes, even while a part of it is unmapped.

use std::{ffi::c_void, io, ops::Range, ptr};

use rustix::{
    io::Errno,
    mm::{MapFlags, ProtFlags, mmap_anonymous},
    rand::{GetRandomFlags, getrandom},
};

/// Addresses that are given to nobody who does not ask for them (Linux `arch/x86/mm/mmap.c`): mappings get the highest
/// room below the stack, or, where the stack has no limit, below a sixth of the address space, 21.3 TiB; if that is full,
/// or by the legacy layout, the lowest above a third, 42.7 TiB. Programs and their heaps are above that or far below.
const PLACES: Range<u64> = 24 << 40..40 << 40;
/// As the largest pages of most files, which can be the guest's only where both addresses are aligned.
const ALIGN: u64 = 2 << 20;
/// So many places are tried, of millions.
const TRIES: usize = 16;

/// Reserves `len` bytes, whole pages, without access, where no mapping comes to lie that does not ask for the place.
pub fn reserve(len: u64) -> io::Result<*mut c_void> {
    let room = PLACES.end - PLACES.start;
    let choices = room.checked_sub(len).ok_or(Errno::NOMEM)? / ALIGN + 1;
    for _ in 0..TRIES {
        let mut random = [0; 8];
        getrandom(&mut random, GetRandomFlags::empty())?;
        let place = PLACES.start + u64::from_ne_bytes(random) % choices * ALIGN;
        // SAFETY: a new mapping where there is none, which nothing can access.
        let start = unsafe {
            mmap_anonymous(
                ptr::without_provenance_mut(place as usize),
                len as usize,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE,
            )
        };
        match start {
            Err(Errno::EXIST) => {}
            start => return Ok(start?),
        }
    }
    Err(Errno::EXIST.into())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::mm::munmap;

    use super::*;

    /// Where a program's mappings are, told by itself.
    fn places_of(command: &str) -> Vec<u64> {
        let output = Command::new("sh").args(["-c", command]).output().unwrap();
        assert!(output.status.success(), "{command}: {output:?}");
        let maps = String::from_utf8(output.stdout).unwrap();
        let starts = maps.lines().filter_map(|line| line.split('-').next());
        let starts = starts.map(|start| u64::from_str_radix(start, 16).unwrap());
        starts.collect()
    }

    #[test]
    fn linux_puts_nothing_here_by_itself() {
        let place = reserve(1 << 30).unwrap();
        let start = place.addr() as u64;
        assert!(PLACES.contains(&start) && PLACES.contains(&(start + (1 << 30) - 1)));
        // SAFETY: it was reserved just now, and nobody else knows of it.
        unsafe { munmap(place, 1 << 30) }.unwrap();
        assert!(reserve(1 << 60).is_err());
        // Without a right to it, the second is the first again.
        let layouts = [
            "cat /proc/self/maps",
            "ulimit -s unlimited 2>/dev/null; cat /proc/self/maps",
            "setarch -L cat /proc/self/maps",
        ];
        for command in layouts {
            for _ in 0..8 {
                let places = places_of(command);
                assert!(places.len() > 4);
                // Below what is there is what comes next.
                let near = PLACES.start..PLACES.end + (1 << 40);
                let found = places.iter().find(|place| near.contains(place));
                assert_eq!(found, None, "{command}: {found:x?}");
            }
        }
    }
}
