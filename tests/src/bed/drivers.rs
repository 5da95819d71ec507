//! Which of Debian's modules drive a PCI device: what `depmod` would write into `modules.alias`.

use std::{fs, path::PathBuf};

use super::{Cache, Modules, StockKernel};
use crate::{Context, Result};

const FILE: &str = "aliases";

/// The list of patterns of devices with the modules that drive them.
#[derive(Clone, Debug)]
pub struct Drivers(PathBuf);

impl Drivers {
    /// Of the stock kernel, from the cache or read out of its modules.
    pub fn get(cache: &Cache, kernel: &StockKernel) -> Result<Self> {
        let dir = cache.entry(
            "stock-drivers-1",
            "reading which devices Debian's modules drive",
            |at| {
                let aliases = Modules::find(&kernel.modules)?.pci_aliases()?;
                let lines = aliases
                    .iter()
                    .map(|(pattern, name)| format!("{pattern} {name}\n"));
                let text: String = lines.collect();
                fs::write(at.join(FILE), text).context("cannot write the list")
            },
        )?;
        Ok(Self(dir.join(FILE)))
    }

    /// The modules that drive the device with this `modalias`.
    pub fn of(&self, modalias: &str) -> Result<Vec<String>> {
        let text = fs::read_to_string(&self.0).context("cannot read the list of drivers")?;
        Ok(fitting(&text, modalias))
    }
}

/// The modules in lines whose patterns fit.
fn fitting(list: &str, modalias: &str) -> Vec<String> {
    let device = modalias.strip_prefix("pci:").unwrap_or_default();
    let lines = list.lines().filter_map(|line| line.split_once(' '));
    let modules = lines.filter(|(pattern, _)| fits(pattern, device));
    let mut modules: Vec<_> = modules.map(|(_, name)| name.to_owned()).collect();
    modules.dedup();
    modules
}

/// Whether a pattern, in which `*` is any text, is all of `text`.
fn fits(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else {
        return false;
    };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_fit_patterns_of_ids_and_of_classes() {
        let vf = "v00008086d000010CAsv00008086sd0000A03Cbc02sc00i00";
        assert!(fits("v00008086d000010CAsv*sd*bc*sc*i*", vf));
        assert!(fits("v*d*sv*sd*bc02sc00i*", vf));
        assert!(fits("v*d*sv*sd*bc*sc*i00", vf));
        assert!(fits(vf, vf));
        for other in [
            "v00008086d000010C9sv*sd*bc*sc*i*",
            "v*d*sv*sd*bc01sc*i*",
            "v00008086",
            "v*i01",
            "",
        ] {
            assert!(!fits(other, vf), "{other}");
        }
        let list = "v00008086d000010CA* igbvf\nv*d*sv*sd*bc02* other\nv*d*sv*sd*bc01* ahci\n";
        assert_eq!(fitting(list, &format!("pci:{vf}")), ["igbvf", "other"]);
        assert!(fitting(list, "usb:v00008086").is_empty());
    }
}
