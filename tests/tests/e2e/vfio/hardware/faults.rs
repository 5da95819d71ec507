//! Faults that the host's IOMMU reports for a device's DMA.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    thread,
    time::{Duration, Instant},
};

use fanlight_tests::{Context, Result, ensure};

/// The IOMMU reports a fault by an interrupt, which may arrive after the DMA has ended.
const SETTLING: Duration = Duration::from_millis(500);
/// Far longer than a report takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// A position in the kernel's log, from which faults of a device are searched.
pub struct Faults {
    log: File,
    address: String,
}

impl Faults {
    /// Follows the device at `address` from now on.
    pub fn of(address: &str) -> Result<Self> {
        let what = "cannot read the kernel's log";
        let mut options = File::options();
        let log = options.read(true).custom_flags(libc::O_NONBLOCK);
        let mut log = log.open("/dev/kmsg").context(what)?;
        log.seek(SeekFrom::End(0)).context(what)?;
        Ok(Self {
            log,
            address: address.into(),
        })
    }

    /// Waits until the kernel reports a fault of the device at `iova`. Fails if it reports another address first:
    /// faults are reported in order.
    pub fn comes_at(&mut self, iova: u64) -> Result<()> {
        let (start, iova) = (Instant::now(), format!("{iova:#x}"));
        loop {
            let faults = self.told()?;
            if !faults.is_empty() {
                let expected = faults.iter().all(|fault| fault.contains(&iova));
                return ensure(expected, format!("not only faults at {iova}: {faults:#?}"));
            }
            let what = "DMA to an unmapped address reported no fault";
            ensure(start.elapsed() < PATIENCE, what)?;
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Fails if the device made a DMA that the IOMMU refused.
    pub fn none_since(mut self) -> Result<()> {
        thread::sleep(SETTLING);
        let faults = self.told()?;
        ensure(faults.is_empty(), format!("DMA faults: {faults:#?}"))
    }

    /// The device's faults reported since the last call.
    fn told(&mut self) -> Result<Vec<String>> {
        /// The longest record of the kernel's log.
        const RECORD: usize = 8192;
        let mut record = [0; RECORD];
        let mut faults = Vec::new();
        loop {
            match self.log.read(&mut record) {
                Ok(len) => {
                    let text = String::from_utf8_lossy(&record[..len]).into_owned();
                    if is_fault(&text, &self.address) {
                        faults.push(text);
                    }
                }
                // Records were overwritten before they were read.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => return Ok(faults),
                Err(error) => return Err(error).context("cannot read the kernel's log"),
            }
        }
    }
}

/// Whether a record is a fault of this device, from the Intel or the AMD IOMMU driver.
fn is_fault(record: &str, address: &str) -> bool {
    // Intel's driver prints no domain before the address; the segment is elsewhere in the line.
    let short = address.split_once(':').map_or(address, |(_, short)| short);
    let intel = record.contains("DMAR:") && record.contains("fault addr");
    let amd = record.contains("IO_PAGE_FAULT");
    (intel || amd) && record.contains(short)
}
