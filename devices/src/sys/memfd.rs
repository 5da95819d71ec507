//! Memory files (memfd) of a fixed size. No process that shares one can shrink it while another has it mapped.

use std::{fs::File, io, os::fd::OwnedFd, sync::Arc};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::{FileOffset, MmapRegion};

/// A memory file of no bytes.
pub fn empty(name: &str) -> io::Result<File> {
    Ok(memfd_create(name, MemfdFlags::CLOEXEC)?.into())
}

/// A memory file of `size` bytes that is sealed against changes of its size, as udmabuf wants it. It is not
/// sealed against writing: udmabuf refuses such a file (Linux `drivers/dma-buf/udmabuf.c`).
pub fn sized(name: &str, size: u64, huge_pages: MemfdFlags) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | huge_pages;
    let memfd = memfd_create(name, flags)?;
    ftruncate(&memfd, size)?;
    fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(memfd.into())
}

/// The same with its mapping.
pub fn mapped(name: &str, size: u64) -> io::Result<(Arc<File>, MmapRegion)> {
    let file = Arc::new(sized(name, size, MemfdFlags::empty())?);
    let mapping = map(FileOffset::from_arc(file.clone(), 0), size)?;
    Ok((file, mapping))
}

/// A memory file that can only be written through the mapping returned with it.
pub fn read_only(name: &str, size: u64) -> io::Result<(OwnedFd, MmapRegion)> {
    let file = sized(name, size, MemfdFlags::empty())?;
    let mapping = map(FileOffset::new(file.try_clone()?, 0), size)?;
    fcntl_add_seals(&file, SealFlags::FUTURE_WRITE | SealFlags::SEAL)?;
    Ok((file.into(), mapping))
}

fn map(file: FileOffset, size: u64) -> io::Result<MmapRegion> {
    let size = usize::try_from(size).map_err(io::Error::other)?;
    MmapRegion::from_file(file, size).map_err(io::Error::other)
}
