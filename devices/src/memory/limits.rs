//! Bounded counters: how much of something the host gives to a guest or to this process.

use std::sync::{
    Arc, LazyLock,
    atomic::{AtomicU64, Ordering},
};

/// A limit and how much of it is in use, in whatever unit the owner counts.
#[derive(Debug)]
pub struct Quota {
    limit: u64,
    used: AtomicU64,
}

impl Quota {
    /// Nothing in use of `limit`.
    pub fn new(limit: u64) -> Arc<Self> {
        let used = AtomicU64::new(0);
        Arc::new(Self { limit, used })
    }

    /// Takes `amount`. `None` if less than that is left.
    pub fn charge(self: &Arc<Self>, amount: u64) -> Option<Charge> {
        self.take(amount).then(|| Charge {
            quota: self.clone(),
            amount,
        })
    }

    /// How much is in use.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }

    fn take(&self, amount: u64) -> bool {
        let sum = |used: u64| used.checked_add(amount).filter(|&sum| sum <= self.limit);
        let taken = self
            .used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, sum);
        taken.is_ok()
    }
}

/// A part of a [`Quota`] in use. Dropping gives it back.
#[derive(Debug)]
pub struct Charge {
    quota: Arc<Quota>,
    amount: u64,
}

impl Charge {
    /// Takes `more` on top. Changes nothing and returns `false` if less than that is left.
    pub fn grow(&mut self, more: u64) -> bool {
        let taken = self.quota.take(more);
        self.amount += if taken { more } else { 0 };
        taken
    }

    /// Gives back all but `amount`, which must not be above what is taken.
    pub fn shrink_to(&mut self, amount: u64) {
        debug_assert!(amount <= self.amount);
        self.quota
            .used
            .fetch_sub(self.amount.saturating_sub(amount), Ordering::AcqRel);
        self.amount = self.amount.min(amount);
    }

    /// How much it holds.
    pub fn amount(&self) -> u64 {
        self.amount
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.shrink_to(0);
    }
}

/// Mappings left to the rest of the process. Without them it cannot allocate memory, and would end.
const RESERVED_MAPPINGS: u64 = 8192;
/// Default of `vm.max_map_count` (Linux `include/linux/mm.h`, DEFAULT_MAX_MAP_COUNT).
const DEFAULT_MAX_MAP_COUNT: u64 = 65530;

/// The mappings that all arenas of this process may consist of.
pub fn arena_mappings() -> Arc<Quota> {
    static QUOTA: LazyLock<Arc<Quota>> = LazyLock::new(|| {
        let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok();
        let limit = limit.and_then(|limit| limit.trim().parse().ok());
        let limit: u64 = limit.unwrap_or(DEFAULT_MAX_MAP_COUNT);
        Quota::new(limit.saturating_sub(RESERVED_MAPPINGS))
    });
    QUOTA.clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_charge_is_given_back() {
        let quota = Quota::new(100);
        let first = quota.charge(60).unwrap();
        assert!(quota.charge(41).is_none());
        assert!(quota.charge(u64::MAX).is_none());
        let _second = quota.charge(40).unwrap();
        drop(first);
        assert_eq!(quota.used(), 40);
    }

    #[test]
    fn a_charge_grows_within_the_limit() {
        let quota = Quota::new(10);
        let mut charge = quota.charge(4).unwrap();
        assert!(charge.grow(6) && !charge.grow(1));
        assert_eq!((charge.amount(), quota.used()), (10, 10));
        charge.shrink_to(3);
        assert_eq!((charge.amount(), quota.used()), (3, 3));
        drop(charge);
        assert_eq!(quota.used(), 0);
    }
}
