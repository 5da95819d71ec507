//! What a PCI function says of itself that is the same in a guest as on its host.

use std::fs;

use crate::{Context, Failure, Result, common::pci::Function, ensure};

/// Capabilities (PCI Code and ID Assignment 1.11, 2) and where their lists start.
const CAP_MSI: u8 = 0x05;
const CAP_MSIX: u8 = 0x11;
const CAPABILITIES: usize = 0x34;
const EXTENDED_START: usize = 0x100;
/// What would let a guest change what the host gave away, or needs an IOMMU in the guest: ARI, ATS, SR-IOV, page
/// requests, resizable BARs, PASID, resizable BARs of virtual functions.
const HIDDEN: [u16; 7] = [0x0e, 0x0f, 0x10, 0x13, 0x15, 0x1b, 0x24];
/// Flags of resources (Linux `include/linux/ioport.h`).
const IO: u64 = 0x100;
const MEMORY: u64 = 0x200;
const PREFETCHABLE: u64 = 0x2000;
const WIDE: u64 = 0x10_0000;

/// A BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its number.
    pub index: u32,
    /// Bytes.
    pub size: u64,
    flags: u64,
}

impl Bar {
    /// Whether it is memory, and not ports.
    pub fn is_memory(&self) -> bool {
        self.flags & MEMORY != 0
    }

    /// Whether it is memory without side effects of reading.
    pub fn is_prefetchable(&self) -> bool {
        self.is_memory() && self.flags & PREFETCHABLE != 0
    }
}

impl Function {
    /// Ids, class, BARs with sizes and kinds, and how many interrupts there are, as one line.
    pub fn describe(&self) -> Result<String> {
        let mut text = format!("{} class {:06x}", self.ids(), self.class()?);
        for bar in self.bars()? {
            let kind = match (bar.flags & IO != 0, bar.flags & WIDE != 0) {
                (true, _) => "ports",
                (false, true) => "memory64",
                (false, false) => "memory32",
            };
            text += &format!(" bar{} {:#x} {kind}", bar.index, bar.size);
            if bar.is_prefetchable() {
                text += " prefetchable";
            }
        }
        let config = self.config()?;
        let count = |id, of: fn(u16) -> u16| match capability(&config, id) {
            Some(at) => u16_at(&config, at + 2).map_or(0, of),
            None => 0,
        };
        let msi = count(CAP_MSI, |control| 1 << (control >> 1 & 7));
        let msix = count(CAP_MSIX, |control| (control & 0x7ff) + 1);
        Ok(format!("{text} msi {msi} msix {msix}"))
    }

    /// The only function that is described so.
    pub fn described(description: &str) -> Result<Self> {
        let all = Self::all()?;
        let mut found = Vec::new();
        let mut others = Vec::new();
        for function in all {
            match function.describe()? {
                is if is == description => found.push(function),
                is => others.push(is),
            }
        }
        match <[Self; 1]>::try_from(found) {
            Ok([function]) => Ok(function),
            Err(found) => Err(Failure(format!(
                "{} functions are {description:?}; the others are {others:#?}",
                found.len()
            ))),
        }
    }

    /// Its class code.
    pub fn class(&self) -> Result<u32> {
        let text = self.attribute("class")?;
        u32::from_str_radix(text.trim_start_matches("0x"), 16).context("its class is no number")
    }

    /// BARs that there are.
    pub fn bars(&self) -> Result<Vec<Bar>> {
        const BARS: usize = 6;
        let text = self.attribute("resource")?;
        let hex = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok();
        let bar = |(index, line): (u32, &str)| {
            let numbers: Vec<_> = line.split_whitespace().filter_map(hex).collect();
            match *numbers.as_slice() {
                [start, last, flags] if last > start => Some(Bar {
                    index,
                    size: last - start + 1,
                    flags,
                }),
                _ => None,
            }
        };
        Ok((0..).zip(text.lines().take(BARS)).filter_map(bar).collect())
    }

    /// Fails if it shows something that a guest must not have.
    pub fn hides_what_is_the_hosts(&self) -> Result<()> {
        let config = self.config()?;
        let shown = extended(&config);
        ensure(
            !shown.iter().any(|id| HIDDEN.contains(id)),
            format!("a capability of the host is among {shown:x?}"),
        )
    }

    /// A file of its directory in sysfs, without white space around it.
    pub fn attribute(&self, name: &str) -> Result<String> {
        let text = fs::read_to_string(self.path().join(name));
        let text = text.context(format!("cannot read {name} of {}", self.address()))?;
        Ok(text.trim().to_owned())
    }

    fn config(&self) -> Result<Vec<u8>> {
        let config = fs::read(self.path().join("config")).context("cannot read config")?;
        // Nobody but root reads more than the header.
        ensure(config.len() >= EXTENDED_START, "config is cut short")?;
        Ok(config)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?.try_into().ok()?;
    Some(u16::from_le_bytes(bytes))
}

/// Where the capability is.
fn capability(config: &[u8], id: u8) -> Option<usize> {
    let mut at = usize::from(*config.get(CAPABILITIES)?);
    // A list of 4 bytes each in 256: a broken one ends.
    for _ in 0..64 {
        if at < 0x40 {
            break;
        }
        if *config.get(at)? == id {
            return Some(at);
        }
        at = usize::from(*config.get(at + 1)?) & !3;
    }
    None
}

/// The ids of extended capabilities.
fn extended(config: &[u8]) -> Vec<u16> {
    let mut ids = Vec::new();
    let mut at = EXTENDED_START;
    for _ in 0..1024 {
        let (Some(id), Some(next)) = (u16_at(config, at), u16_at(config, at + 2)) else {
            break;
        };
        ids.push(id);
        at = usize::from(next >> 4) & !3;
        if at < EXTENDED_START {
            break;
        }
    }
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_found_and_broken_lists_end() {
        let mut config = vec![0; 4096];
        config[CAPABILITIES] = 0x40;
        config[0x40..0x42].copy_from_slice(&[1, 0x70]);
        config[0x70..0x74].copy_from_slice(&[CAP_MSIX, 0x40, 2, 0x80]);
        assert_eq!(capability(&config, CAP_MSIX), Some(0x70));
        assert_eq!(capability(&config, CAP_MSI), None);
        config[0x100..0x104].copy_from_slice(&[1, 0, 1, 0x14]);
        config[0x140..0x144].copy_from_slice(&[0x10, 0, 1, 0x10]);
        assert_eq!(extended(&config)[..3], [1, 0x10, 1]);
        assert_eq!(extended(&config[..0x100]), [0; 0]);
    }
}
