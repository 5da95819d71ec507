//! The kernel module for guests that exports dma-bufs as the driver of a GPU does, built for the L1 kernel.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::PathBuf,
};

use super::{
    Cache,
    kernel_build::{BuildInputs, CHANGES, CONFIG, KernelTree},
};
use crate::{Context, Result};

const NAME: &str = "fanlight_vram";
const SOURCES: [(&str, &str); 3] = [
    (
        "Kbuild",
        include_str!("../../../resources/guest-module/Kbuild"),
    ),
    (
        "fanlight_vram.h",
        include_str!("../../../resources/guest-module/fanlight_vram.h"),
    ),
    (
        "fanlight_vram.c",
        include_str!("../../../resources/guest-module/fanlight_vram.c"),
    ),
];
/// Besides what the kernel leaves out.
const LEFT_OUT: [&str; 1] = ["*/drivers/*.[ch]"];

/// The module from the cache, or built: less than a minute on two cores.
pub fn guest_module(cache: &Cache) -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    (SOURCES, CONFIG, CHANGES).hash(&mut hasher);
    let key = format!("guest-module-{:016x}", hasher.finish());
    let file = format!("{NAME}.ko");
    if let Some(dir) = cache.find(&key) {
        return Ok(dir.join(file));
    }
    let inputs = BuildInputs::get(cache)?;
    let dir = cache.entry(&key, "a kernel module for guests", |at, step| {
        let tree = KernelTree::new(inputs, at, &LEFT_OUT, step)?;
        let module = at.join("module");
        fs::create_dir(&module).context("cannot make a directory")?;
        for (name, text) in SOURCES {
            fs::write(module.join(name), text).context("cannot write the source of the module")?;
        }
        step.detail("compiling");
        tree.make(&["modules_prepare"], step)?;
        // Without the list of the kernel's symbols names are looked up when the module is loaded.
        let folder = format!("M={}", module.display());
        tree.make(&["KBUILD_MODPOST_WARN=1", &folder, "modules"], step)?;
        fs::copy(module.join(&file), at.join(&file)).context("cannot keep the module")?;
        fs::remove_dir_all(&module).context("cannot remove the source of the module")?;
        tree.remove()
    })?;
    Ok(dir.join(file))
}
