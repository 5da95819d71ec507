//! Kernel modules with what they depend on, in the order in which they load.

use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use crate::{Context, Failure, Result};

/// The modules of one kernel.
#[derive(Debug)]
pub struct Modules {
    files: BTreeMap<String, PathBuf>,
}

impl Modules {
    /// Finds the modules below `lib/modules/VERSION`.
    pub fn find(root: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut left = vec![root.join("kernel")];
        while let Some(dir) = left.pop() {
            for entry in fs::read_dir(&dir).context(format!("cannot list {}", dir.display()))? {
                let path = entry.context("cannot list modules")?.path();
                if path.is_dir() {
                    left.push(path);
                } else if let Some(name) = module_name(&path) {
                    files.insert(name, path);
                }
            }
        }
        Ok(Self { files })
    }

    /// Names and places below `root`, a line for each.
    pub(super) fn list(&self, root: &Path) -> Vec<String> {
        let below = |path: &Path| {
            let path = path.strip_prefix(root).unwrap_or(path);
            path.to_string_lossy().into_owned()
        };
        let files = self.files.iter();
        files
            .map(|(name, path)| format!("{name} {}", below(path)))
            .collect()
    }

    /// The modules that [`Modules::list`] gave lines of. Reads no directory.
    pub(super) fn listed(root: &Path, list: &str) -> Self {
        let lines = list.lines().filter_map(|line| line.split_once(' '));
        let files = lines.map(|(name, path)| (name.to_owned(), root.join(path)));
        Self {
            files: files.collect(),
        }
    }

    /// The PCI devices that each module drives, from its `alias=pci:` lines: pattern and module. Reads all drivers,
    /// which takes some seconds.
    pub(super) fn pci_aliases(&self) -> Result<Vec<(String, String)>> {
        let mut aliases = Vec::new();
        for (name, path) in &self.files {
            if path.components().any(|part| part.as_os_str() == "drivers") {
                let patterns = info(&read(path)?, "alias=pci:");
                aliases.extend(patterns.into_iter().map(|pattern| (pattern, name.clone())));
            }
        }
        Ok(aliases)
    }

    /// The content of the named modules and of all that they need, each after what it needs. Leaves out modules that
    /// are built into this kernel.
    pub fn load_order(&self, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut order = Vec::new();
        for name in names {
            self.add(name, &mut order, 0)?;
        }
        Ok(order)
    }

    fn add(&self, name: &str, order: &mut Vec<(String, Vec<u8>)>, depth: u32) -> Result<()> {
        const MAX_DEPTH: u32 = 32;
        let name = name.replace('-', "_");
        if order.iter().any(|(other, _)| *other == name) {
            return Ok(());
        }
        if depth > MAX_DEPTH {
            return Err(Failure(format!("module {name} depends on itself")));
        }
        let Some(path) = self.files.get(&name) else {
            return Ok(());
        };
        let content = read(path)?;
        for needed in dependencies(&content) {
            self.add(&needed, order, depth + 1)?;
        }
        order.push((name, content));
        Ok(())
    }
}

/// `dir/kvm-amd.ko.xz` is module `kvm_amd`.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let stem = file.strip_suffix(".ko").or(file.strip_suffix(".ko.xz"))?;
    Some(stem.replace('-', "_"))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let what = format!("cannot read {}", path.display());
    let bytes = fs::read(path).context(&what)?;
    if path.extension().is_none_or(|extension| extension != "xz") {
        return Ok(bytes);
    }
    let mut content = Vec::new();
    liblzma::read::XzDecoder::new(&bytes[..])
        .read_to_end(&mut content)
        .context(&what)?;
    Ok(content)
}

/// The modules that the `.modinfo` section of a module names as needed.
fn dependencies(module: &[u8]) -> Vec<String> {
    let lists = info(module, "depends=");
    let names = lists.iter().flat_map(|list| list.split(','));
    names
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

/// The `.modinfo` lines of a module that start with `prefix`, without it.
fn info(module: &[u8], prefix: &str) -> Vec<String> {
    let lines = module.split(|&byte| byte == 0);
    lines
        .filter_map(|line| line.strip_prefix(prefix.as_bytes()))
        .map(|value| String::from_utf8_lossy(value).into_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_first_and_once() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("kernel");
        fs::create_dir(&kernel).unwrap();
        for (name, info) in [
            ("a.ko", "x\0depends=b-c,d\0"),
            ("b-c.ko", "depends=d\0"),
            ("d.ko", "depends=\0"),
        ] {
            fs::write(kernel.join(name), info).unwrap();
        }
        let found = Modules::find(dir.path()).unwrap();
        let list = found.list(dir.path()).join("\n");
        let modules = Modules::listed(dir.path(), &list);
        assert_eq!(modules.files, found.files);
        let order = modules.load_order(&["a", "d", "built_in"]).unwrap();
        let names: Vec<_> = order.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["d", "b_c", "a"]);
    }
}
