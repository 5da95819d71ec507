//! A virtio driver in a guest program that breaks the rules.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    thread,
    time::{Duration, Instant},
};

use rustix::mm::{MapFlags, ProtFlags, mlock, mmap_anonymous, munmap};

use crate::{
    Context, Result,
    common::pci::{Function, Mmio},
    ensure,
};

/// Offsets in BAR 0 at which Fanlight has the common configuration and the doorbell of the first queue.
const COMMON: usize = 0;
const NOTIFY: usize = 0x3000;
/// Fields of the common configuration (Virtio 1.3, 4.1.4.3).
const DRIVER_FEATURE_SELECT: usize = COMMON + 0x08;
const DRIVER_FEATURE: usize = COMMON + 0x0c;
const STATUS: usize = COMMON + 0x14;
const QUEUE_SELECT: usize = COMMON + 0x16;
const QUEUE_SIZE: usize = COMMON + 0x18;
const QUEUE_ENABLE: usize = COMMON + 0x1c;
const QUEUE_ADDRESSES: [usize; 3] = [COMMON + 0x20, COMMON + 0x28, COMMON + 0x30];

const ACKNOWLEDGE_AND_DRIVER: u8 = 3;
const FEATURES_OK: u8 = 8;
const DRIVER_OK: u8 = 4;
const NEEDS_RESET: u8 = 64;
/// VIRTIO_F_VERSION_1 in the upper half of the features.
const VERSION_1: u32 = 1;

/// Offsets of a queue's rings in one page: descriptor table, available ring, used ring.
const RINGS: [usize; 3] = [0, 0x100, 0x200];
const ENTRIES: u16 = 2;
const WRITE_ONLY: u64 = 2 << 32;
/// Far longer than the device takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Unbinds the driver of the device with these ids, and submits a buffer where no memory is. Returns the device status
/// once it says that the device needs a reset.
pub fn break_device(ids: &str) -> Result<u8> {
    let function = Function::only(ids)?;
    let unbind = function.path().join("driver/unbind");
    if unbind.exists() {
        fs::write(&unbind, function.address()).context("cannot take the device from its driver")?;
    }
    function.enable(true)?;
    let registers = function.map(0)?;
    let page = Page::new()?;
    let address = page.physical()?;

    registers.write(STATUS, 0u8);
    let mut status = ACKNOWLEDGE_AND_DRIVER;
    registers.write(STATUS, status);
    registers.write(DRIVER_FEATURE_SELECT, 1u32);
    registers.write(DRIVER_FEATURE, VERSION_1);
    status |= FEATURES_OK;
    registers.write(STATUS, status);
    registers.write(QUEUE_SELECT, 0u16);
    registers.write(QUEUE_SIZE, ENTRIES);
    for (register, ring) in QUEUE_ADDRESSES.into_iter().zip(RINGS) {
        let [low, high] = halves(address + ring as u64);
        registers.write(register, low);
        registers.write(register + 4, high);
    }
    registers.write(QUEUE_ENABLE, 1u16);
    registers.write(STATUS, status | DRIVER_OK);

    let [descriptors, available, _] = RINGS;
    let nowhere = 1u64 << 60;
    page.write(descriptors, nowhere);
    page.write(descriptors + 8, 64 | WRITE_ONLY);
    // Flags 0, index 1, the first entry 0.
    page.write(available, 1u64 << 16);
    registers.write(NOTIFY, 0u16);
    wait_for_status(&registers, NEEDS_RESET)
}

fn wait_for_status(registers: &Mmio, bit: u8) -> Result<u8> {
    let start = Instant::now();
    loop {
        let status = registers.read::<u8>(STATUS);
        if status & bit != 0 {
            return Ok(status);
        }
        ensure(
            start.elapsed() < PATIENCE,
            format!("the device's status stays {status:#x}"),
        )?;
        thread::sleep(Duration::from_millis(10));
    }
}

fn halves(address: u64) -> [u32; 2] {
    [address as u32, (address >> 32) as u32]
}

/// A locked page for a device to read.
struct Page(*mut u8);

impl Page {
    const LEN: usize = 4096;

    fn new() -> Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base =
            unsafe { mmap_anonymous(std::ptr::null_mut(), Self::LEN, access, MapFlags::PRIVATE) }
                .context("cannot map a page")?;
        let page = Self(base.cast());
        page.write(0, 0);
        // SAFETY: the page was just mapped, and locking changes no byte of it.
        unsafe { mlock(base, Self::LEN) }.context("cannot lock a page")?;
        Ok(page)
    }

    /// Its guest-physical address (Linux `Documentation/admin-guide/mm/pagemap.rst`).
    fn physical(&self) -> Result<u64> {
        const PRESENT: u64 = 1 << 63;
        const FRAME: u64 = (1 << 55) - 1;
        let pagemap = File::open("/proc/self/pagemap").context("cannot open the page map")?;
        let mut entry = [0; 8];
        let at = self.0 as u64 / Self::LEN as u64 * 8;
        pagemap
            .read_exact_at(&mut entry, at)
            .context("cannot read the page map")?;
        let entry = u64::from_le_bytes(entry);
        let present = entry & PRESENT != 0 && entry & FRAME != 0;
        ensure(present, format!("the page has no frame: {entry:#x}"))?;
        Ok((entry & FRAME) * Self::LEN as u64)
    }

    fn write(&self, offset: usize, value: u64) {
        assert!(offset.is_multiple_of(8) && offset + 8 <= Self::LEN);
        // SAFETY: the page is mapped while this lives, and the offset is within it and aligned.
        unsafe { self.0.add(offset).cast::<u64>().write_volatile(value) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and no other owner exists.
        let _ = unsafe { munmap(self.0.cast(), Self::LEN) };
    }
}
