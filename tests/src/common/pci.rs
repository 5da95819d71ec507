//! PCI functions as sysfs gives them to programs, in guests and on hosts.

use std::{
    fs::{self, File},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::{Context, Failure, Result};

/// Offset of COMMAND, and its bits for memory accesses and DMA.
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 0b110;

/// A function.
#[derive(Clone, Debug)]
pub struct Function(PathBuf);

impl Function {
    /// All functions, by address.
    pub fn all() -> Result<Vec<Self>> {
        let list = "cannot list PCI devices";
        let mut found = Vec::new();
        for entry in fs::read_dir("/sys/bus/pci/devices").context(list)? {
            found.push(Self(entry.context(list)?.path()));
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }

    /// The function at an address that sysfs knows it by.
    pub fn at(address: &str) -> Self {
        Self(Path::new("/sys/bus/pci/devices").join(address))
    }

    /// Functions with these ids, such as `1234:11e8`, by address.
    pub fn find(ids: &str) -> Result<Vec<Self>> {
        let mut found = Self::all()?;
        found.retain(|function| function.ids() == ids);
        Ok(found)
    }

    /// The only function with these ids.
    pub fn only(ids: &str) -> Result<Self> {
        match <[Self; 1]>::try_from(Self::find(ids)?) {
            Ok([function]) => Ok(function),
            Err(others) => Err(Failure(format!(
                "{} functions have ids {ids}",
                others.len()
            ))),
        }
    }

    /// Vendor and device id.
    pub fn ids(&self) -> String {
        let id = |name| {
            let text = fs::read_to_string(self.0.join(name)).unwrap_or_default();
            text.trim().trim_start_matches("0x").to_owned()
        };
        format!("{}:{}", id("vendor"), id("device"))
    }

    /// Its directory in sysfs.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where it is, such as `0000:00:01.0`.
    pub fn address(&self) -> String {
        let name = self.0.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// The driver that has it.
    pub fn driver(&self) -> Option<String> {
        let link = fs::read_link(self.0.join("driver")).ok()?;
        Some(link.file_name()?.to_string_lossy().into_owned())
    }

    /// Takes it from its driver.
    pub fn unbind(&self) -> Result<()> {
        let file = self.0.join("driver/unbind");
        fs::write(file, self.address()).context(format!("cannot unbind {}", self.address()))
    }

    /// Gives it to a driver.
    pub fn bind(&self, driver: &str) -> Result<()> {
        let file = format!("/sys/bus/pci/drivers/{driver}/bind");
        let address = self.address();
        fs::write(file, &address).context(format!("cannot bind {address} to {driver}"))
    }

    /// Lets it answer memory accesses and do DMA, or neither.
    pub fn enable(&self, on: bool) -> Result<()> {
        let config = File::options().write(true).open(self.0.join("config"));
        let value = if on { MEMORY_AND_MASTER } else { 0 };
        config
            .and_then(|config| config.write_all_at(&value.to_le_bytes(), COMMAND))
            .context(format!("cannot write COMMAND of {}", self.address()))
    }

    /// Address and length of BAR `index` as this system sees it.
    pub fn bar(&self, index: usize) -> Result<(u64, u64)> {
        let text = fs::read_to_string(self.0.join("resource")).context("cannot read BARs")?;
        let line = text.lines().nth(index).unwrap_or_default();
        let mut numbers = line
            .split_whitespace()
            .map_while(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok());
        match (numbers.next(), numbers.next()) {
            (Some(start), Some(last)) if start != 0 => Ok((start, last - start + 1)),
            _ => Err(Failure(format!("{} has no BAR {index}", self.address()))),
        }
    }

    /// Maps BAR `index`.
    pub fn map(&self, index: usize) -> Result<Mmio> {
        let (_, len) = self.bar(index)?;
        self.map_part(index, 0..len)
    }

    /// Maps pages of BAR `index`.
    pub fn map_part(&self, index: usize, part: Range<u64>) -> Result<Mmio> {
        let path = self.0.join(format!("resource{index}"));
        let what = format!("cannot map {}", path.display());
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .context(&what)?;
        Mmio::new(&file, part.start, part.end - part.start).context(&what)
    }
}

/// Memory of a device.
#[derive(Debug)]
pub struct Mmio {
    base: *mut u8,
    len: usize,
}

impl Mmio {
    /// Maps `len` bytes at `offset` of a device's file.
    pub fn new(file: &File, offset: u64, len: u64) -> std::io::Result<Self> {
        let len = len as usize;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let (anywhere, shared) = (std::ptr::null_mut(), MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mmap(anywhere, len, access, shared, file, offset) }?;
        Ok(Self {
            base: base.cast(),
            len,
        })
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        let size = size_of::<T>();
        assert!(
            offset.is_multiple_of(size) && offset + size <= self.len,
            "offset {offset:#x}"
        );
        self.base.wrapping_add(offset).cast()
    }

    /// Reads a register of the type's width.
    pub fn read<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: `at` checked that the register is in the mapping, and aligned.
        unsafe { self.at::<T>(offset).read_volatile() }
    }

    /// Writes a register of the type's width.
    pub fn write<T>(&self, offset: usize, value: T) {
        // SAFETY: `at` checked that the register is in the mapping, and aligned.
        unsafe { self.at::<T>(offset).write_volatile(value) }
    }
}

impl Drop for Mmio {
    fn drop(&mut self) {
        // SAFETY: made by `Mmio::new`, and nobody else knows it.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}
