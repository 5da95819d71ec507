//! The L1 kernel: everything built in, so that L1 starts in two seconds and has what the Debian kernel leaves out
//! (iommufd, the device interface of VFIO).

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
};

use super::{
    Cache,
    kernel_build::{BuildInputs, CHANGES, CONFIG, KernelTree},
};
use crate::Result;

/// The built kernel.
#[derive(Clone, Debug)]
pub struct BuiltKernel {
    /// The image that L1 boots.
    pub bzimage: PathBuf,
    /// The same as an ELF file with a PVH entry.
    pub vmlinux: PathBuf,
}

impl BuiltKernel {
    /// The kernel in the cache entry `dir`.
    fn at(dir: &Path) -> Self {
        Self {
            bzimage: dir.join("bzImage"),
            vmlinux: dir.join("vmlinux"),
        }
    }
}

/// The kernel from the cache, or built: five to twelve minutes on two cores.
pub fn built_kernel(cache: &Cache) -> Result<BuiltKernel> {
    let mut hasher = DefaultHasher::new();
    (CONFIG, CHANGES).hash(&mut hasher);
    let key = format!("l1-kernel-{:016x}", hasher.finish());
    if let Some(dir) = cache.find(&key) {
        return Ok(BuiltKernel::at(&dir));
    }
    let inputs = BuildInputs::get(cache)?;
    let what = "the L1 kernel, which takes five to twelve minutes";
    let dir = cache.entry(&key, what, |at, step| {
        let tree = KernelTree::new(inputs, at, &[], step)?;
        step.detail("compiling");
        tree.make(&["bzImage"], step)?;
        let kernel = BuiltKernel::at(at);
        tree.copy("arch/x86/boot/bzImage", &kernel.bzimage)?;
        tree.copy("vmlinux", &kernel.vmlinux)?;
        tree.remove()
    })?;
    Ok(BuiltKernel::at(&dir))
}
