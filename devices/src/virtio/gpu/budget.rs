//! How much of the host's memory a guest can make the device hold.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// A limit and what is in use of it. Clones count together.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Account>);

#[derive(Debug)]
struct Account {
    limit: u64,
    used: AtomicU64,
}

impl Budget {
    /// `limit` bytes.
    pub fn new(limit: u64) -> Self {
        Self(Arc::new(Account {
            limit,
            used: AtomicU64::new(0),
        }))
    }

    /// Takes `bytes`, if as many are left.
    pub fn charge(&self, bytes: u64) -> Option<Charge> {
        let account = &self.0;
        let more = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= account.limit);
        account
            .used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more)
            .ok()?;
        Some(Charge {
            budget: self.clone(),
            bytes,
        })
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.0.used.load(Ordering::Acquire)
    }
}

/// Bytes taken off a budget, given back when dropped.
#[derive(Debug)]
pub struct Charge {
    budget: Budget,
    bytes: u64,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.0.used.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_comes_back() {
        let budget = Budget::new(100);
        let first = budget.charge(60).unwrap();
        assert!(budget.charge(41).is_none());
        assert!(budget.charge(u64::MAX).is_none());
        let _second = budget.charge(40).unwrap();
        drop(first);
        assert_eq!(budget.used(), 40);
    }
}
