//! The guest's kernel module that exports dma-bufs as a GPU's driver does, built for the nested host's kernel.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
};

use super::{
    Cache,
    kernel::{CONFIG, configure},
    packages::{kernel_source, run},
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
/// What building a module needs nothing of, which is most of the kernel.
const LEFT_OUT: [&str; 4] = ["*.rst", "*.yaml", "*/drivers/*.[ch]", "*/sound/*.[ch]"];

/// The module from the cache, or built: less than a minute on two cores.
pub fn guest_module(cache: &Cache) -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    (SOURCES, CONFIG).hash(&mut hasher);
    let key = format!("guest-module-{:016x}", hasher.finish());
    let file = format!("{NAME}.ko");
    let path = cache.root().join(&key).join(&file);
    if path.exists() {
        return Ok(path);
    }
    let source = kernel_source(cache)?;
    let dir = cache.entry(&key, "building the guest's kernel module", |at| {
        build(&source, at, &file)
    })?;
    Ok(dir.join(file))
}

fn build(source: &Path, at: &Path, file: &str) -> Result<()> {
    let (tree, module) = (at.join("source"), at.join("module"));
    for dir in [&tree, &module] {
        fs::create_dir(dir).context("cannot make a directory")?;
    }
    let left_out = LEFT_OUT.map(|pattern| format!("--exclude={pattern}"));
    run(Command::new("tar")
        .args(left_out)
        .args(["--strip-components=1", "-xf"])
        .arg(source)
        .arg("-C")
        .arg(&tree))?;
    for (name, text) in SOURCES {
        fs::write(module.join(name), text).context("cannot write the module's source")?;
    }
    let make = configure(&tree, &at.join("config"))?;
    make(&["modules_prepare"])?;
    // Without the kernel's own list of symbols names are looked up when the module is loaded.
    make(&[
        "KBUILD_MODPOST_WARN=1",
        &format!("M={}", module.display()),
        "modules",
    ])?;
    fs::copy(module.join(file), at.join(file)).context("cannot keep the module")?;
    for dir in [&tree, &module] {
        fs::remove_dir_all(dir).context("cannot remove the kernel's source")?;
    }
    Ok(())
}
