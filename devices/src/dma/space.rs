//! The address space in which passed-through devices do DMA, as other devices see it.

use std::{fmt, fs::File, io, sync::Arc};

use crate::sys::file_kind::FileKind;

/// An address space for DMA: a [`crate::vfio::Iommu`], or a fake in unit tests.
pub trait DmaSpace: fmt::Debug + Send + Sync {
    /// Maps `len` bytes at `iova`, until the result is dropped.
    fn map(
        self: Arc<Self>,
        iova: u64,
        len: u64,
        source: &DmaMemory,
    ) -> io::Result<Box<dyn fmt::Debug + Send>>;
}

/// Memory of a blob.
#[derive(Debug)]
pub struct DmaMemory(pub(crate) MemoryKind);

#[derive(Debug)]
pub(crate) enum MemoryKind {
    /// A memory file: where it is mapped. The kernel pins its pages.
    File(u64),
    /// A dma-buf, mapped as such or not at all. Its exporter may move what a mapping of the processor shows, and
    /// would not notify an IOMMU.
    DmaBuf(File),
}

impl DmaMemory {
    /// A blob in `file`'s memory from its first byte on, mapped at `host`. Fails if devices cannot be given this kind
    /// of file.
    ///
    /// # Safety
    /// The blob must stay mapped there, and this process must not refer to it, while the [`SharedBlob`] made of this
    /// exists.
    pub unsafe fn new(file: &File, host: u64) -> io::Result<Self> {
        Ok(Self(match FileKind::of(file)? {
            FileKind::Memory => MemoryKind::File(host),
            FileKind::DmaBuf => MemoryKind::DmaBuf(file.try_clone()?),
            FileKind::Other => return Err(io::ErrorKind::Unsupported.into()),
        }))
    }
}

#[cfg(test)]
pub(crate) mod test_util {
    use std::collections::BTreeMap;

    use super::*;
    use crate::sync::Mutex;

    /// An address space that remembers what is mapped: address and length.
    #[derive(Debug, Default)]
    pub struct FakeSpace {
        pub mapped: Mutex<BTreeMap<u64, u64>>,
        /// Whether it maps nothing.
        pub refuses: bool,
    }

    #[derive(Debug)]
    struct FakeMapping(Arc<FakeSpace>, u64);

    impl Drop for FakeMapping {
        fn drop(&mut self) {
            self.0.mapped.lock().remove(&self.1);
        }
    }

    impl FakeSpace {
        pub fn mapped(&self) -> Vec<(u64, u64)> {
            let mapped = self.mapped.lock();
            mapped.iter().map(|(&at, &len)| (at, len)).collect()
        }
    }

    impl DmaSpace for FakeSpace {
        fn map(
            self: Arc<Self>,
            iova: u64,
            len: u64,
            _: &DmaMemory,
        ) -> io::Result<Box<dyn fmt::Debug + Send>> {
            if self.refuses {
                return Err(io::ErrorKind::Unsupported.into());
            }
            let before = self.mapped.lock().insert(iova, len);
            assert!(before.is_none(), "{iova:#x} is mapped twice");
            Ok(Box::new(FakeMapping(self, iova)))
        }
    }
}
