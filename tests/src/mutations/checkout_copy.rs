//! A copy of the checkout for patches, with a target directory of its own that later runs use again.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use super::patch::Mutation;
use crate::{
    Context, Result,
    nested_host::{checkout, run_command},
};

/// The copy, below `target`.
#[derive(Debug)]
pub struct CheckoutCopy {
    /// Its root.
    pub root: PathBuf,
    /// The files of the last [`CheckoutCopy::restore`].
    files: BTreeSet<PathBuf>,
}

impl CheckoutCopy {
    /// Makes the copy, or brings it up to date.
    pub fn make() -> Result<Self> {
        let root = checkout().join("target/mutations/checkout");
        fs::create_dir_all(&root).context(format!("cannot make {}", root.display()))?;
        let root = root.canonicalize().context("cannot find the copy")?;
        let mut copy = Self {
            root,
            files: BTreeSet::new(),
        };
        copy.restore()?;
        Ok(copy)
    }

    /// Gives all files the content that they have in the checkout. A file that has it already keeps its time, so cargo
    /// builds only what a patch changed.
    pub fn restore(&mut self) -> Result<()> {
        let from = checkout();
        let mut list = Command::new("git");
        list.arg("-C").arg(&from).args(["ls-files", "-z"]);
        // What git does not ignore belongs to the checkout, committed or not.
        list.args(["--cached", "--others", "--exclude-standard"]);
        let list = run_command(&mut list)?;
        let files: BTreeSet<_> = list
            .split('\0')
            .map(|name| PathBuf::from(name.trim_end_matches('\n')))
            .filter(|name| from.join(name).is_file())
            .collect();
        for gone in self.files.difference(&files) {
            remove(&self.root.join(gone)).context("cannot delete a file of the copy")?;
        }
        for file in &files {
            update(&from.join(file), &self.root.join(file))
                .context(format!("cannot copy {}", file.display()))?;
        }
        self.files = files;
        Ok(())
    }

    /// Applies the patch.
    pub fn apply(&self, mutation: &Mutation) -> Result<()> {
        run_command(git_apply(&self.root).arg(&mutation.path)).map(|_| ())
    }
}

/// The command that applies patches to the directory, which counts as no part of a repository.
fn git_apply(root: &Path) -> Command {
    let mut command = Command::new("git");
    command.current_dir(root).arg("apply");
    if let Some(parent) = root.parent() {
        command.env("GIT_CEILING_DIRECTORIES", parent);
    }
    command
}

fn update(from: &Path, to: &Path) -> io::Result<()> {
    let content = fs::read(from)?;
    if fs::read(to).is_ok_and(|old| old == content) {
        return Ok(());
    }
    if let Some(dir) = to.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(to, content)?;
    fs::set_permissions(to, fs::metadata(from)?.permissions())
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
