//! Where downloads and builds are kept: under `target/nested-host`, or where `FANLIGHT_NESTED_HOST_CACHE` says.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Once,
};

use rustix::fs::{FlockOperation, flock};

use crate::{
    Context, Result,
    progress::{self, Step},
};

/// A process tells once where it puts things.
static ANNOUNCED: Once = Once::new();

/// A directory with one entry for each thing that was downloaded or built.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The cache of this checkout.
    pub fn open() -> Result<Self> {
        let root = match std::env::var_os("FANLIGHT_NESTED_HOST_CACHE") {
            Some(path) => PathBuf::from(path),
            None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/nested-host"),
        };
        fs::create_dir_all(&root).context(format!("cannot make {}", root.display()))?;
        let root = root
            .canonicalize()
            .context(format!("cannot find {}", root.display()))?;
        Ok(Self { root })
    }

    /// The cache in the directory `root`, which is there.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The entry `key`, if it is there.
    pub fn find(&self, key: &str) -> Option<PathBuf> {
        let path = self.root.join(key);
        path.exists().then_some(path)
    }

    /// The entry `key`; `make` fills a fresh directory if it is not there. `what` names it for a person. An entry is
    /// whole or absent, and two processes do not make the same one twice.
    pub fn entry(
        &self,
        key: &str,
        what: &str,
        make: impl FnOnce(&Path, &Step) -> Result<()>,
    ) -> Result<PathBuf> {
        if let Some(path) = self.find(key) {
            return Ok(path);
        }
        let path = self.root.join(key);
        let lock_path = self.root.join(format!("{key}.lock"));
        let lock = File::create(&lock_path).context("cannot make a lock file")?;
        flock(&lock, FlockOperation::LockExclusive).context("cannot lock the cache")?;
        if path.exists() {
            return Ok(path);
        }
        let partial = self.root.join(format!("{key}.partial"));
        if partial.exists() {
            fs::remove_dir_all(&partial).context("cannot clean the cache")?;
        }
        fs::create_dir_all(&partial).context("cannot make a cache entry")?;
        ANNOUNCED.call_once(|| {
            let root = self.root.display();
            eprintln!(
                "fanlight: fetching and building what is missing in {root}; later runs use it"
            );
        });
        progress::step(what, |step| make(&partial, step))?;
        fs::rename(&partial, &path).context("cannot finish a cache entry")?;
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Failure;

    #[test]
    fn an_entry_is_made_once_and_a_failed_one_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let failed = cache.entry("a", "a", |_, _| Err(Failure("no".into())));
        assert!(failed.is_err() && !dir.path().join("a").exists());
        for _ in 0..2 {
            let mut made = 0;
            let path = cache
                .entry("a", "a", |at, _| {
                    made += 1;
                    fs::write(at.join("x"), "1").context("write")
                })
                .unwrap();
            assert!(path.join("x").exists());
            assert!(made <= 1);
        }
    }
}
