//! What the host's IOMMU says of a device's DMA.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
};

use fanlight_tests::{Context, Result, guest::ensure};

/// A place in the kernel's log, from which on a device's faults are looked for.
pub struct Faults {
    log: File,
    address: String,
}

impl Faults {
    /// Of the device at `address`, from now on.
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

    /// Fails if the device tried to reach what it may not.
    pub fn none_since(mut self) -> Result<()> {
        /// The longest record.
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
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => break,
                Err(error) => return Err(error).context("cannot read the kernel's log"),
            }
        }
        ensure(faults.is_empty(), format!("DMA went wrong: {faults:#?}"))
    }
}

/// Whether a record is of a fault of this device's, by Intel's driver or by AMD's.
fn is_fault(record: &str, address: &str) -> bool {
    // Intel's knows no domains, but segments elsewhere in the line.
    let short = address.split_once(':').map_or(address, |(_, short)| short);
    let intel = record.contains("DMAR:") && record.contains("fault addr");
    let amd = record.contains("IO_PAGE_FAULT");
    (intel || amd) && record.contains(short)
}
