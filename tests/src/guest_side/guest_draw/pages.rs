//! Memory of chosen physical pages in a dma-buf: pages of a memfd, chosen by physical address and joined by the guest's
//! own udmabuf. Drivers that import it list them in this order.

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::Arc,
};

use fanlight_devices::dmabuf::{Udmabuf, UdmabufItem};
use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

use crate::{Context, Failure, Result};

const PAGE: u64 = 4096;
const HUGE_PAGE: u64 = 2 << 20;
const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";
const LIST_LIMIT: &str = "/sys/module/udmabuf/parameters/list_limit";
/// Pages to choose from, for each wanted page.
const CHOICE: u64 = 3;
/// Fields of a `/proc/PID/pagemap` entry: whether the page is present, and its frame number.
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// Memory with a chosen physical layout.
#[derive(Debug)]
pub struct Scattered {
    /// The memory.
    pub dmabuf: OwnedFd,
    /// Physically contiguous pieces of the memory, in its order.
    pub pieces: usize,
}

impl Scattered {
    /// Allocates `size` bytes in the fewest possible pieces.
    pub fn contiguous(size: u64) -> Result<Self> {
        let huge = size.div_ceil(HUGE_PAGE);
        fs::write(HUGE_PAGES, huge.to_string()).context("cannot reserve huge pages")?;
        let memory = Memory::new(huge * HUGE_PAGE, MemfdFlags::HUGETLB)?;
        let pages: Vec<_> = (0..size.div_ceil(PAGE)).collect();
        memory.join(&pages)
    }

    /// Allocates `size` bytes in pieces of `run` pages, no two of them adjacent.
    pub fn in_pieces(size: u64, run: usize) -> Result<Self> {
        let wanted = size.div_ceil(PAGE);
        let memory = Memory::new(wanted * CHOICE * PAGE, MemfdFlags::empty())?;
        let chosen = choose(&memory.frames()?, run, wanted as usize).ok_or_else(|| {
            Failure(format!(
                "the guest's memory has too few runs of {run} pages"
            ))
        })?;
        memory.join(&chosen)
    }
}

/// Chooses indices of pages in runs of `run`, with a gap after each run.
fn choose(frames: &[u64], run: usize, wanted: usize) -> Option<Vec<u64>> {
    let mut sorted: Vec<_> = frames.iter().copied().zip(0u64..).collect();
    sorted.sort_unstable();
    let mut chosen = Vec::new();
    let mut at = 0;
    while chosen.len() < wanted {
        let piece = sorted.get(at..at + run)?;
        let (first, last) = (piece.first()?.0, piece.last()?.0);
        if last - first == run as u64 - 1 {
            chosen.extend(piece.iter().map(|&(_, index)| index));
            // One more page is left out, unless there is a gap anyway.
            at += run + 1;
        } else {
            at += 1;
        }
    }
    chosen.truncate(wanted);
    Some(chosen)
}

/// A memfd whose pages are all allocated.
struct Memory {
    file: Arc<File>,
    size: u64,
}

impl Memory {
    fn new(size: u64, kind: MemfdFlags) -> Result<Self> {
        let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC | kind;
        let file = memfd_create("scattered", flags).context("cannot make a memfd")?;
        ftruncate(&file, size).context("cannot make a memfd larger")?;
        fcntl_add_seals(&file, SealFlags::SHRINK).context("cannot seal a memfd")?;
        let memory = Self {
            file: Arc::new(file.into()),
            size,
        };
        memory.frames()?;
        Ok(memory)
    }

    /// The physical page of each page. Allocates those that do not exist.
    fn frames(&self) -> Result<Vec<u64>> {
        mapped_frames(&self.file, self.size)
    }

    /// A dma-buf of these pages in this order.
    fn join(&self, pages: &[u64]) -> Result<Scattered> {
        fs::write(LIST_LIMIT, pages.len().max(1024).to_string())
            .context("cannot raise the guest's list_limit")?;
        let items: Vec<_> = pages
            .iter()
            .map(|&page| UdmabufItem::new(&self.file, page * PAGE, PAGE))
            .collect();
        let dmabuf = Udmabuf::open()
            .and_then(|udmabuf| udmabuf.create_list(&items))
            .context("cannot make the guest's dma-buf")?;
        let all = self.frames()?;
        let frames: Vec<_> = pages
            .iter()
            .filter_map(|&page| all.get(page as usize).copied())
            .collect();
        Ok(Scattered {
            dmabuf,
            pieces: pieces(&frames),
        })
    }
}

/// Number of runs of consecutive pages.
fn pieces(frames: &[u64]) -> usize {
    let breaks = frames.windows(2).filter(|pair| pair[0] + 1 != pair[1]);
    breaks.count() + 1
}

/// The physical pages of the first `size` bytes of a mappable file.
fn mapped_frames(fd: impl AsFd, size: u64) -> Result<Vec<u64>> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let how = MapFlags::SHARED | MapFlags::POPULATE;
    let anywhere = std::ptr::null_mut();
    // SAFETY: a new mapping at an address that the kernel chooses.
    let start = unsafe { mmap(anywhere, size as usize, access, how, fd, 0) }
        .context("cannot map memory to see where it lies")?;
    let frames = frames(start.addr() as u64, size / PAGE);
    // SAFETY: the mapping was made here, and no other owner exists.
    let _ = unsafe { munmap(start, size as usize) };
    frames
}

/// The physical pages behind `count` pages of this program's memory.
fn frames(start: u64, count: u64) -> Result<Vec<u64>> {
    let pagemap = File::open("/proc/self/pagemap").context("cannot open the page map")?;
    let mut bytes = vec![0; count as usize * 8];
    pagemap
        .read_exact_at(&mut bytes, start / PAGE * 8)
        .context("cannot read the page map")?;
    let entries = bytes.as_chunks().0.iter().copied().map(u64::from_le_bytes);
    entries
        .map(|entry| match entry & FRAME {
            frame @ 1.. if entry & PRESENT != 0 => Ok(frame),
            _ => Err(Failure("the page map does not tell where pages lie".into())),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_chosen_in_runs_with_gaps() {
        // Ten consecutive pages in mixed order, and three elsewhere.
        let frames = [15, 10, 11, 12, 14, 13, 16, 17, 18, 19, 40, 41, 42];
        let at = |chosen: Vec<u64>| -> Vec<u64> {
            chosen
                .into_iter()
                .map(|index| frames[index as usize])
                .collect()
        };
        assert_eq!(at(choose(&frames, 1, 5).unwrap()), [10, 12, 14, 16, 18]);
        assert_eq!(
            at(choose(&frames, 3, 7).unwrap()),
            [10, 11, 12, 14, 15, 16, 40]
        );
        assert!(choose(&frames, 4, 12).is_none());
    }
}
