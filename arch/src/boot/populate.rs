//! Memory that the guest uses from its first instruction on, allocated beside the loading of its kernel.
//!
//! A guest that starts in untouched RAM takes a fault on the host for every page: twenty thousand until
//! its init, most of them in the kernel's image and in what the kernel allocates first, at the top of
//! RAM. In huge pages, and made while the decompressor runs, they cost a few dozen.

use std::{
    ops::Range,
    sync::mpsc::{self, Receiver, Sender},
    thread,
};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileSlice};

use super::MIB;
use crate::GuestMemory;

/// Size of a huge page.
const HUGE: u64 = 2 * MIB;
/// How much is made at once.
const SPAN: u64 = 8 * HUGE;
/// What the kernel allocates from the top of RAM downwards, besides its page structures: page tables,
/// per-CPU areas, hashes.
const EARLY: u64 = 16 * MIB;
/// What it allocates after, from the end of ZONE_DMA upwards, until its init.
const LATER: Range<u64> = 16 * MIB..48 * MIB;
/// The kernel's array of page structures takes a 64th of RAM. More than this is not needed at once.
const PAGE_STRUCTURES_MAX: u64 = 64 * MIB;

/// Hands ranges to a thread that allocates their pages, in the order given.
#[derive(Clone, Debug)]
pub struct Populate(Sender<(Range<u64>, Sender<()>)>);

impl Populate {
    /// Runs `work` with such a thread; returns when the thread is done too.
    pub fn beside<T>(mem: &GuestMemory, work: impl FnOnce(&Populate) -> T) -> T {
        thread::scope(|scope| {
            let (sender, ranges) = mpsc::channel::<(Range<u64>, Sender<()>)>();
            // Without a thread only its help is lost.
            let _ = thread::Builder::new()
                .name("populate".into())
                .spawn_scoped(scope, move || {
                    for (range, done) in ranges {
                        populate(mem, range);
                        // Few wait for it.
                        let _ = done.send(());
                    }
                });
            work(&Populate(sender))
        })
    }

    /// Has a range allocated. What comes back ends when it is done.
    pub fn range(&self, range: Range<u64>) -> Receiver<()> {
        let (sender, done) = mpsc::channel();
        // The thread is gone if it could not be made.
        let _ = self.0.send((range, sender));
        done
    }

    /// Has the kernel's image allocated, and then what the kernel allocates first. Returns when the start of the image is there: who fills it is slower, and
    /// comes after. A page that is being filled cannot become part of a huge one.
    pub fn kernel(&self, image: Range<u64>, mem: &GuestMemory) {
        let start_end = image.start.saturating_add(SPAN).min(image.end);
        let start = self.range(image.start..start_end);
        self.range(start_end..image.end);
        let ram: u64 = mem.iter().map(GuestMemoryRegion::len).sum();
        if let Some(last) = mem.iter().last() {
            let end = last.start_addr().0 + last.len();
            let len = EARLY + (ram / 64).min(PAGE_STRUCTURES_MAX);
            self.range(end.saturating_sub(len).max(last.start_addr().0)..end);
        }
        self.range(LATER);
        let _ = start.recv();
    }
}

/// Allocates all of RAM, in huge pages where the host has them. Before it is locked for DMA: a page that is locked
/// stays as small as it is, and all of the guest's later accesses are slower.
pub fn populate_all(mem: &GuestMemory) {
    for region in mem.iter() {
        let start = region.start_addr().0;
        populate(mem, start..start + region.len());
    }
}

/// Allocates the pages of a range, huge ones where the host has them.
fn populate(mem: &GuestMemory, range: Range<u64>) {
    let ram_end = mem
        .find_region(GuestAddress(range.start))
        .map_or(0, |region| region.start_addr().0 + region.len());
    let end = range.end.min(ram_end).next_multiple_of(HUGE).min(ram_end);
    let mut at = range.start & !(HUGE - 1);
    while at < end {
        let len = SPAN.min(end - at);
        match mem.get_slice(GuestAddress(at), len as usize) {
            Ok(span) => populate_span(&span),
            // The guest's own faults serve as well.
            Err(_) => return,
        }
        at += len;
    }
}

fn populate_span(span: &VolatileSlice) {
    let guard = span.ptr_guard_mut();
    let advise = |from: usize, len: usize, advice: i32| {
        let start = guard.as_ptr().wrapping_add(from);
        // SAFETY: the span is a live mapping of this process with `from + len` within it, and none of the
        // hints used here changes its content.
        unsafe { libc::madvise(start.cast(), len, advice) == 0 }
    };
    // Only where there is a page can there be a huge one (Linux `mm/khugepaged.c`, collapse_scan_file).
    let page = crate::layout::PAGE_SIZE as usize;
    for chunk in (0..span.len()).step_by(HUGE as usize) {
        advise(chunk, page, libc::MADV_POPULATE_WRITE);
    }
    // Before Linux 6.1, or with no huge page free, they become ordinary pages.
    if !advise(0, span.len(), libc::MADV_COLLAPSE) {
        let error = std::io::Error::last_os_error();
        tracing::debug!(%error, "no huge pages for all of the kernel's memory");
        advise(0, span.len(), libc::MADV_POPULATE_WRITE);
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn what_is_there_stays() {
        let mem = GuestMemory::from_ranges(&[(GuestAddress(0), 9 << 20)]).unwrap();
        for at in [0, 3 << 20, (9 << 20) - 8] {
            mem.write_obj(at ^ 0x55, GuestAddress(at)).unwrap();
        }
        // Beyond RAM's end too.
        Populate::beside(&mem, |populate| {
            populate.range(MIB..20 * MIB);
            populate.kernel(2 * MIB..4 * MIB, &mem);
            // As the headers of a bad kernel may say.
            populate.kernel(u64::MAX - 1..u64::MAX, &mem);
        });
        populate_all(&mem);
        for at in [0, 3 << 20, (9 << 20) - 8] {
            assert_eq!(mem.read_obj::<u64>(GuestAddress(at)).unwrap(), at ^ 0x55);
        }
    }
}
