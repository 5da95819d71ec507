//! Lists of the Debian kernel modules and of the PCI devices that each drives, as `depmod` would write them into
//! `modules.dep` and `modules.alias`. To read them out of thousands of files is slow, above all in the nested host.

use std::{fs, path::PathBuf};

use super::{Cache, Modules, StockKernel};
use crate::{Context, Result};

const ALIASES: &str = "aliases";
const FILES: &str = "files";

/// The modules of the stock kernel as two lists in files.
#[derive(Clone, Debug)]
pub struct Drivers {
    lists: PathBuf,
    modules: PathBuf,
}

impl Drivers {
    /// From the cache, or made.
    pub fn get(cache: &Cache, kernel: &StockKernel) -> Result<Self> {
        let modules = kernel.modules.clone();
        let what = "a list of the Debian kernel modules and their devices";
        let lists = cache.entry("stock-drivers-2", what, |at, _| {
            let all = Modules::find(&modules)?;
            let write = |name: &str, lines: Vec<String>| {
                fs::write(at.join(name), lines.join("\n")).context("cannot write a list")
            };
            write(FILES, all.list(&modules))?;
            let aliases = all.pci_aliases()?;
            let lines = aliases.iter();
            let lines = lines.map(|(pattern, name)| format!("{pattern} {name}"));
            write(ALIASES, lines.collect())
        })?;
        Ok(Self { lists, modules })
    }

    /// All modules.
    pub fn modules(&self) -> Result<Modules> {
        Ok(Modules::listed(&self.modules, &self.read(FILES)?))
    }

    /// The modules that drive the device with this `modalias`.
    pub fn of(&self, modalias: &str) -> Result<Vec<String>> {
        Ok(fitting(&self.read(ALIASES)?, modalias))
    }

    fn read(&self, name: &str) -> Result<String> {
        fs::read_to_string(self.lists.join(name)).context("cannot read a list of modules")
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
