//! A cache of descriptors of blob memory.
//!
//! The renderer sends the memory of a blob when it has made it, since the driver of Linux maps it at once, and
//! again on request. A mapped blob needs no descriptor. The cache saves the request for drivers that map the same
//! few blobs again and again.

use std::{collections::VecDeque, fs::File};

/// Memory of a blob.
#[derive(Debug)]
pub struct BlobFile {
    /// The memory.
    pub file: File,
    /// How the guest is to cache it (`VIRTIO_GPU_MAP_CACHE_*`).
    pub cache: u32,
}

/// Descriptors that are kept: a process may have a thousand files, or a few thousand.
pub const MOST: usize = 64;

/// The memory of the blobs that were made or requested last; the newest is last.
#[derive(Debug, Default)]
pub struct BlobFiles(VecDeque<(u32, BlobFile)>);

impl BlobFiles {
    /// Keeps the memory of blob `id`, which must not be kept already. Drops the one that was not used for the
    /// longest time.
    pub fn keep(&mut self, id: u32, memory: BlobFile) {
        if self.0.len() == MOST {
            self.0.pop_front();
        }
        self.0.push_back((id, memory));
    }

    /// The memory of blob `id`, if it is kept.
    pub fn get(&mut self, id: u32) -> Option<&BlobFile> {
        let place = self.0.iter().rposition(|(other, _)| *other == id)?;
        let found = self.0.remove(place)?;
        self.0.push_back(found);
        self.0.back().map(|(_, memory)| memory)
    }

    /// Drops the memory of blob `id`, which no longer exists.
    pub fn forget(&mut self, id: u32) {
        self.0.retain(|(other, _)| *other != id);
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    fn memory(cache: u32) -> BlobFile {
        let file = File::from(memfd_create("blob", MemfdFlags::CLOEXEC).unwrap());
        BlobFile { file, cache }
    }

    #[test]
    fn the_last_ones_are_kept() {
        let mut files = BlobFiles::default();
        let last = MOST as u32 + 1;
        (0..=last).for_each(|id| files.keep(id, memory(id)));
        for id in 0..=last {
            let kept = files.get(id).map(|memory| memory.cache);
            assert_eq!(kept, (id > 1).then_some(id));
        }
        // What was asked for stays.
        assert!(files.get(2).is_some());
        files.keep(last + 1, memory(0));
        assert!(files.get(2).is_some() && files.get(3).is_none());
        files.forget(last);
        assert!(files.get(last).is_none());
        // Another blob of the same number.
        files.keep(last, memory(7));
        assert_eq!(files.get(last).map(|memory| memory.cache), Some(7));
        files.clear();
        assert!(files.get(last).is_none());
    }
}
