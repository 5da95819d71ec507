//! How many mappings this process may have for arenas.

use std::sync::{
    Arc, LazyLock,
    atomic::{AtomicUsize, Ordering},
};

/// How many mappings arenas may be made of. There is one for all of a process, whose limit it is.
#[derive(Debug)]
pub struct Budget {
    most: usize,
    used: AtomicUsize,
}

static ALL: LazyLock<Arc<Budget>> = LazyLock::new(|| Arc::new(Budget::new(most_mappings())));

impl Budget {
    /// That of this process.
    pub fn of_process() -> Arc<Self> {
        ALL.clone()
    }

    /// One of so many.
    pub fn new(most: usize) -> Self {
        let used = AtomicUsize::new(0);
        Self { most, used }
    }

    /// Takes so many more, if there are so many.
    pub fn take(&self, more: usize) -> bool {
        let taken = |used: usize| used.checked_add(more).filter(|used| *used <= self.most);
        let order = Ordering::Relaxed;
        self.used.fetch_update(order, order, taken).is_ok()
    }

    /// How many are taken.
    #[cfg(test)]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// So many are free again.
    pub fn give(&self, fewer: usize) {
        self.used.fetch_sub(fewer, Ordering::Relaxed);
    }
}

/// Mappings of a process that are not for an arena: whoever cannot map any more cannot allocate memory either, and
/// ends.
const KEPT_MAPPINGS: usize = 8192;
/// Linux's own limit.
const DEFAULT_MAX_MAP_COUNT: usize = 65530;

/// How many mappings the arenas of this process may be made of.
fn most_mappings() -> usize {
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok();
    let limit = limit.and_then(|limit| limit.trim().parse().ok());
    let limit: usize = limit.unwrap_or(DEFAULT_MAX_MAP_COUNT);
    limit.saturating_sub(KEPT_MAPPINGS)
}
