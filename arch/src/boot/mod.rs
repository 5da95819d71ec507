//! Puts a kernel, its initial RAM disk and its command line into guest memory.
//!
//! A bzImage is entered by Linux's 64-bit protocol, unpacked on the host where its format is known
//! ([`unpack`]); an ELF vmlinux by PVH.

mod bzimage;
mod image;
mod kaslr;
mod linux;
mod payload;
mod populate;
mod pvh;
mod relocations;
#[cfg(test)]
mod test_image;
mod unpack;
mod vmlinux;

use std::{
    fs::File,
    io::{self, Read},
    path::PathBuf,
};

use thiserror::Error;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, ReadVolatile,
};

use crate::{GuestMemory, layout, regs::Entry};
use populate::Populate;
pub use populate::populate_all;

/// For messages.
const MIB: u64 = 1 << 20;

/// What to boot.
#[derive(Debug)]
pub struct BootSource {
    /// The kernel's path, for messages.
    pub kernel_path: PathBuf,
    /// The kernel: a bzImage or an ELF vmlinux.
    pub kernel: File,
    /// Initial RAM disk with its path.
    pub initrd: Option<(PathBuf, File)>,
    /// Kernel command line.
    pub cmdline: String,
    /// Whether a bzImage is left to decompress itself.
    pub guest_unpacks: bool,
    /// ACPI root pointer, as [`crate::acpi::write_tables`] returned it.
    pub rsdp: u64,
}

/// Why there is nothing to boot. All but [`LoadError::Memory`] are about what the user gave.
#[derive(Debug, Error)]
pub enum LoadError {
    /// Neither of the formats.
    #[error("{}: not a kernel: give a bzImage or an ELF vmlinux for x86-64", .0.display())]
    NotAKernel(PathBuf),
    /// A kernel that cannot be booted as it is.
    #[error("{}: {problem}", path.display())]
    BadKernel {
        /// The kernel.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The file ends early.
    #[error("{}: the kernel is truncated: its header says {expected} bytes, the file has {actual}", path.display())]
    Truncated {
        /// The kernel.
        path: PathBuf,
        /// How long it should be.
        expected: u64,
        /// How long it is.
        actual: u64,
    },
    /// A file does not fit into RAM.
    #[error("{}: does not fit: needs {needed} MiB where the guest has {available} MiB; give the guest more memory", path.display())]
    TooLarge {
        /// The kernel or the initial RAM disk.
        path: PathBuf,
        /// What it needs, in MiB.
        needed: u64,
        /// What there is, in MiB.
        available: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("the kernel command line has {len} bytes, this kernel takes {max}: shorten it")]
    CmdlineTooLong {
        /// Its length.
        len: usize,
        /// What the kernel takes.
        max: usize,
    },
    /// A NUL or a character outside of ASCII.
    #[error("the kernel command line has a character that is not printable ASCII")]
    CmdlineNotAscii,
    /// A file could not be read.
    #[error("{}: cannot read it", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Guest memory could not be written.
    #[error("cannot write the kernel into guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// Loads everything into `mem`, which must be clear; the result is where the first vCPU starts.
pub fn load(mem: &GuestMemory, mut source: BootSource) -> Result<Entry, LoadError> {
    if !source
        .cmdline
        .bytes()
        .all(|byte| byte == b'\t' || (b' '..=b'~').contains(&byte))
    {
        return Err(LoadError::CmdlineNotAscii);
    }
    let mut magic = [0; 4];
    let read = source
        .kernel
        .read(&mut magic)
        .map_err(|source_error| LoadError::Read {
            path: source.kernel_path.clone(),
            source: source_error,
        })?;
    Populate::beside(mem, |populate| match &magic[..read] {
        b"\x7fELF" => pvh::load(mem, source, populate),
        _ => linux::load(mem, source, populate),
    })
}

/// Writes the command line with its NUL. `kernel_max` is what the kernel takes without the NUL.
fn write_cmdline(mem: &GuestMemory, cmdline: &str, kernel_max: usize) -> Result<(), LoadError> {
    let max = kernel_max.min(layout::CMDLINE_MAX - 1);
    if cmdline.len() > max {
        return Err(LoadError::CmdlineTooLong {
            len: cmdline.len(),
            max,
        });
    }
    mem.write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE))?;
    let end = layout::CMDLINE + cmdline.len() as u64;
    Ok(mem.write_obj(0u8, GuestAddress(end))?)
}

/// Where the RAM that starts at 0 ends.
fn low_ram_end(mem: &GuestMemory) -> u64 {
    mem.find_region(GuestAddress(0))
        .map_or(0, |region| region.len())
}

/// Places the initial RAM disk as high as `limit` and low RAM allow, not below `floor`. Returns its
/// address and size.
fn load_initrd(
    mem: &GuestMemory,
    path: PathBuf,
    mut file: File,
    floor: u64,
    limit: u64,
) -> Result<(u64, u64), LoadError> {
    let read_error = |source| LoadError::Read {
        path: path.clone(),
        source,
    };
    let size = file.metadata().map_err(read_error)?.len();
    let top = low_ram_end(mem).min(limit);
    let start = top
        .checked_sub(size)
        .map(|start| start & !(layout::PAGE_SIZE - 1))
        .filter(|&start| start >= floor)
        .ok_or_else(|| LoadError::TooLarge {
            path: path.clone(),
            needed: size.div_ceil(MIB),
            available: top.saturating_sub(floor) / MIB,
        })?;
    let mut slice = mem.get_slice(GuestAddress(start), size as usize)?;
    file.read_exact_volatile(&mut slice)
        .map_err(|error| read_error(io::Error::other(error)))?;
    Ok((start, size))
}
