//! Device nodes that only root may open, without a change to the host's.

use std::path::Path;

use rustix::{
    fs::{FileType, Mode, mknodat, stat},
    mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount},
};

use crate::{Context, Result};

/// From now on only root may open these device nodes, as this process and its children see them. They get nodes of
/// their own in place of the host's, so this process needs a mount namespace of its own.
pub fn leave_to_root(nodes: &[&str]) -> Result<()> {
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    // Device nodes in the directory for temporary files may be without effect.
    let options = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("tmpfs", dir.path(), "tmpfs", options, c"mode=755")
        .context("cannot mount a file system for device nodes")?;
    let result = nodes.iter().enumerate().try_for_each(|(number, node)| {
        replace(Path::new(node), &dir.path().join(number.to_string()))
    });
    // The nodes stay where they are bound.
    unmount(dir.path(), UnmountFlags::DETACH).context("cannot unmount device nodes")?;
    result
}

fn replace(node: &Path, with: &Path) -> Result<()> {
    let device = stat(node).context(node.display())?.st_rdev;
    let mode = Mode::RUSR | Mode::WUSR;
    mknodat(
        rustix::fs::CWD,
        with,
        FileType::CharacterDevice,
        mode,
        device,
    )
    .context(format!("cannot make a node like {}", node.display()))?;
    mount_bind(with, node).context(format!("cannot replace {}", node.display()))
}
