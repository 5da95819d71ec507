//! Memory of a passed-through device as a dma-buf: its identity, its readers, and refused exports.

use std::{io, os::fd::AsFd, path::Path, process::Command, sync::Arc};

use fanlight_devices::{
    dmabuf::vfio_export::{self, Access, BarRange, DmaBufError},
    error_line,
    vfio::{HostDevice, Iommu, sysfs::HostFunction},
};
use fanlight_tests::{
    Context, Failure, Result,
    common::{edu, pci::Function},
    ensure,
    host_side::{dma_reader::DmaReader, guest::Assets, test_case::TestCase},
};

use super::vfio::{PEERS, hardware::faults::Faults};

pub const TESTS: &[TestCase] = &[
    TestCase::new("dmabuf::another_device_reads_it", another_device_reads).devices(PEERS),
    TestCase::new("dmabuf::what_cannot_be_is_refused_by_name", refused).devices(PEERS),
];

const PAGE: u64 = 4096;
/// The BAR with ivshmem's memory.
const BAR: u32 = 2;
/// VFIO's index of configuration space, and COMMAND there with its memory and bus master bits.
const CONFIG: u32 = 7;
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: [u8; 2] = [0b110, 0];
/// An IOVA that is never mapped.
const NOWHERE: u64 = 0x3000_0000;

fn failure(error: &dyn std::error::Error) -> Failure {
    Failure(error_line(error))
}

/// Opens the edu and the ivshmem device.
fn open(assets: &Assets, iommufd: bool) -> Result<[Arc<HostDevice>; 2]> {
    let mut functions = Vec::new();
    for ids in [edu::IDS, edu::MEMORY_IDS] {
        let address = Function::only(ids)?.address();
        let status = Command::new(&assets.fanlight)
            .args(["vfio", "bind", &address])
            .status()
            .context("cannot run fanlight")?;
        ensure(status.success(), format!("bind: {status}"))?;
        let address = address.parse().context("not a PCI address")?;
        functions.extend(HostFunction::find(address));
    }
    let iommu = Iommu::open(&functions, Some(iommufd), None).map_err(|error| failure(&error))?;
    let open = |function: &HostFunction| {
        let device =
            HostDevice::open(function, iommu.clone(), None).map_err(|error| failure(&error))?;
        device
            .write(CONFIG, COMMAND, &MEMORY_AND_MASTER)
            .context("cannot write COMMAND")?;
        Ok::<_, Failure>(Arc::new(device))
    };
    Ok([open(&functions[0])?, open(&functions[1])?])
}

fn range(offset: u64, len: u64) -> BarRange {
    BarRange { offset, len }
}

/// A page that differs from every other page.
fn pattern(seed: u64) -> Vec<u8> {
    let word = |index: u64| (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed;
    (0..PAGE / 8)
        .flat_map(|index| word(index).to_le_bytes())
        .collect()
}

fn another_device_reads(assets: &Assets) -> Result<()> {
    let [edu, memory] = open(assets, true)?;
    let reader = DmaReader::new(edu.clone())?;
    let (quiet, mut faulty) = (
        Faults::of(&memory.address.to_string())?,
        Faults::of(&edu.address.to_string())?,
    );
    let offset = 0x12_3000;
    memory
        .write(BAR, offset, &pattern(1))
        .context("cannot fill the BAR")?;
    let export = |ranges: &[BarRange]| {
        vfio_export::export(&*memory, BAR, ranges, Access::ReadWrite)
            .map_err(|error| failure(&error))
    };
    let one = export(&[range(offset, PAGE)])?;
    ensure(is_dmabuf(&one)? == PAGE, "the dma-buf has the wrong size")?;
    let scattered: Vec<_> = (0..256).map(|page| range(page * 3 * PAGE, PAGE)).collect();
    ensure(
        is_dmabuf(&export(&scattered)?)? == 256 * PAGE,
        "the dma-buf lacks ranges",
    )?;

    let copy = || reader.page(&one, 0);
    ensure(copy()? == pattern(1), "the device read other bytes")?;

    // While memory decoding is off the dma-buf is revoked; afterwards the same dma-buf works again.
    memory
        .write(CONFIG, COMMAND, &[0; 2])
        .context("cannot write COMMAND")?;
    let revoked = memory
        .iommu
        .map_file(0, &one, 0, PAGE)
        .err()
        .and_then(|e| e.raw_os_error());
    ensure(
        revoked == Some(libc::ENODEV),
        format!("revoked: {revoked:?}"),
    )?;
    memory
        .write(CONFIG, COMMAND, &MEMORY_AND_MASTER)
        .context("cannot write COMMAND")?;
    memory
        .write(BAR, offset, &pattern(2))
        .context("cannot fill the BAR")?;
    ensure(
        copy()? == pattern(2),
        "the device read other bytes after memory decoding was off",
    )?;
    // A failed DMA is reported for the device that made it, and for no other.
    reader.reach_for(NOWHERE)?;
    faulty.comes_at(NOWHERE)?;
    quiet.none_since()
}

/// The size of a dma-buf. Its name identifies it, and mmap must fail for one of a device.
fn is_dmabuf(fd: &impl AsFd) -> Result<u64> {
    let number = std::os::fd::AsRawFd::as_raw_fd(&fd.as_fd());
    let name = std::fs::read_link(Path::new("/proc/self/fd").join(number.to_string()));
    let name = name.context("cannot look at a descriptor")?;
    ensure(
        name.to_string_lossy().contains("dmabuf"),
        format!("{name:?} is not a dma-buf"),
    )?;
    // SAFETY: a new mapping at an address that the kernel chooses; it must fail.
    let mapped = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            PAGE as usize,
            rustix::mm::ProtFlags::READ,
            rustix::mm::MapFlags::SHARED,
            fd,
            0,
        )
    };
    let error = mapped
        .err()
        .map(io::Error::from)
        .and_then(|error| error.raw_os_error());
    ensure(
        error == Some(libc::EINVAL),
        format!("mapping it: {error:?}"),
    )?;
    rustix::fs::seek(fd, rustix::fs::SeekFrom::End(0)).context("cannot ask for the size")
}

fn refused(assets: &Assets) -> Result<()> {
    // The container exports as iommufd does.
    let [_edu, memory] = open(assets, false)?;
    let export = |region, ranges: &[BarRange]| {
        vfio_export::export(&*memory, region, ranges, Access::ReadOnly)
    };
    is_dmabuf(&export(BAR, &[range(0, 64 << 20)]).map_err(|error| failure(&error))?)?;
    let refuse = |region, ranges: &[BarRange], expected: fn(&DmaBufError) -> bool| match export(
        region, ranges,
    ) {
        Ok(_) => Err(Failure(format!(
            "{ranges:?} of BAR {region} must not be exported"
        ))),
        Err(error) => ensure(
            error.is_guest_mistake() && expected(&error),
            error_line(&error),
        ),
    };
    refuse(BAR, &[], |e| matches!(e, DmaBufError::Empty))?;
    refuse(BAR, &[range(0, 0)], |e| {
        matches!(e, DmaBufError::Unaligned { .. })
    })?;
    refuse(BAR, &[range(0x800, PAGE)], |e| {
        matches!(e, DmaBufError::Unaligned { .. })
    })?;
    refuse(BAR, &[range(64 << 20, PAGE)], |e| {
        matches!(e, DmaBufError::OutOfBounds { .. })
    })?;
    // 256 bytes of registers, which is less than a page.
    refuse(0, &[range(0, PAGE)], |e| {
        matches!(e, DmaBufError::OutOfBounds { .. })
    })?;
    refuse(4, &[range(0, PAGE)], |e| {
        matches!(e, DmaBufError::OutOfBounds { .. })
    })?;
    refuse(6, &[range(0, PAGE)], |e| {
        matches!(e, DmaBufError::NotMemory(6))
    })?;
    vfio_export::probe(&*memory).map_err(|error| failure(&error))
}
