//! Device memory outside the guest: as dma-bufs, and as screen content.

use std::{io, os::fd::AsFd, slice};

use fanlight_devices::{
    dmabuf::vfio_export::{self, Access, BarRange},
    error_line,
    vfio::{HostDevice, Iommu, sysfs::HostFunction},
};
use fanlight_tests::{
    Context, Failure, Result, common::pci::Function, ensure, host_side::guest::Assets,
};

use crate::e2e::vram;

const PAGE: u64 = 4096;
/// VFIO's index of configuration space, and COMMAND there with its memory bit.
const CONFIG: u32 = 7;
const COMMAND: u64 = 4;
const MEMORY: [u8; 2] = [0b10, 0];
const OFF: [u8; 2] = [0; 2];
/// The IOVA of the mappings that are tried, above all reserved ranges.
const IOVA: u64 = 1 << 32;

/// Opens the device as Fanlight does.
fn open(function: &HostFunction, iommufd: bool) -> Result<HostDevice> {
    let line = |error: &dyn std::error::Error| Failure(error_line(error));
    let iommu = Iommu::open(slice::from_ref(function), Some(iommufd), None);
    let iommu = iommu.map_err(|error| line(&error))?;
    HostDevice::open(function, iommu, None).map_err(|error| line(&error))
}

/// Each memory BAR becomes a dma-buf, as a whole and in parts, and iommufd maps it for other devices. While memory
/// decoding is off the mapping fails; afterwards, and after a reset, it works again.
pub fn exported(function: &HostFunction, iommufd: bool) -> Result<Vec<String>> {
    let device = open(function, iommufd)?;
    if let Err(error) = vfio_export::probe(&device) {
        return Ok(vec![format!("not: dma-bufs: {}", error_line(&error))]);
    }
    let mut report = Vec::new();
    for bar in Function::at(&function.address.to_string()).bars()? {
        let number = bar.index;
        if !bar.is_memory() {
            continue;
        }
        if !bar.size.is_multiple_of(PAGE) {
            report.push(format!(
                "not: a dma-buf of BAR {number}, which is smaller than a page"
            ));
            continue;
        }
        let what = format!("BAR {number}");
        power(&device, MEMORY)?;
        let export = |ranges: &[(u64, u64)]| {
            let ranges = ranges.iter().map(|&(offset, len)| BarRange { offset, len });
            let ranges: Vec<_> = ranges.collect();
            let exported = vfio_export::export(&device, number, &ranges, Access::ReadWrite);
            exported.map_err(|error| Failure(error_line(&error)))
        };
        let whole = export(&[(0, bar.size)])?;
        ensure(size(&whole)? == bar.size, format!("{what}: another size"))?;
        if bar.size > 2 * PAGE {
            let parts = export(&[(bar.size - PAGE, PAGE), (0, PAGE)])?;
            ensure(
                size(&parts)? == 2 * PAGE,
                format!("{what}: parts are missing"),
            )?;
        }
        let mut done = format!("did: dma-buf of {what}, {:#x} bytes", bar.size);
        if iommufd {
            let map = |when: &str| {
                let mapped = device.iommu.map_file(IOVA, &whole, 0, bar.size);
                mapped.context(format!("{what}: cannot map its dma-buf {when}"))
            };
            map("at first")?;
            // The physical function controls memory decoding of its virtual functions.
            if function.physical_function().is_none() {
                power(&device, OFF)?;
                ensure(
                    map("").is_err(),
                    format!("{what} can be mapped while memory decoding is off"),
                )?;
                power(&device, MEMORY)?;
                map("after it was off")?;
            }
            if device.reset().is_ok() {
                power(&device, MEMORY)?;
                map("after a reset")?;
            }
            done += ", mapped for other devices";
        }
        report.push(done);
    }
    Ok(report)
}

fn power(device: &HostDevice, command: [u8; 2]) -> Result<()> {
    let written = device.write(CONFIG, COMMAND, &command);
    written.context("cannot write COMMAND")
}

fn size(dmabuf: &impl AsFd) -> Result<u64> {
    rustix::fs::seek(dmabuf, rustix::fs::SeekFrom::End(0))
        .map_err(io::Error::from)
        .context("cannot ask for a dma-buf's size")
}

/// Pixels that a guest draws into the memory of a display or memory device reach its screen and leave as a dma-buf.
/// Memory of other devices is not written: it may hold registers.
pub fn shown(assets: &Assets, address: &str) -> Result<Vec<String>> {
    /// Base classes (PCI Code and ID Assignment 1.11, 1).
    const DISPLAY: u32 = 0x03;
    const MEMORY: u32 = 0x05;
    let function = Function::at(address);
    if !matches!(function.class()? >> 16, DISPLAY | MEMORY) {
        return Ok(Vec::new());
    }
    let bars = function.bars()?.into_iter();
    let largest = bars.filter(|bar| bar.is_prefetchable());
    let Some(bar) = largest.max_by_key(|bar| bar.size) else {
        return Ok(vec!["not: a picture, for no BAR is like memory".into()]);
    };
    let (number, middle) = (bar.index, bar.size / 2);
    if middle < vram::ROOM {
        return Ok(vec![format!(
            "not: a picture, for which BAR {number} is too small"
        )]);
    }
    vram::shown_from(assets, address, &function.ids(), number, middle)?;
    Ok(vec![format!(
        "did: a picture in BAR {number} was shown and exported"
    )])
}
