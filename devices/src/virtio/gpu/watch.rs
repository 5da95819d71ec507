//! Those who look at outputs, and what they have not heard of yet.
//!
//! What happened is merged, not queued: a watcher that does not listen costs as much as one that does. A
//! watcher may pace the guest: a fenced flush is answered when it has released what it shows, or after
//! [`PATIENCE`]; who lets that pass paces nobody until it has caught up.

use std::{
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use vmm_sys_util::eventfd::EventFd;

use super::{output::OUTPUTS, scanout::Area};

/// The longest that watchers delay a fence. Linux waits 50 ms for one.
pub const PATIENCE: Duration = Duration::from_millis(40);
/// Rectangles that are kept apart; more become one.
const MAX_DAMAGE: usize = 16;

/// What a watcher has not heard of one output.
#[derive(Clone, Debug, Default)]
pub(super) struct Changes {
    pub scanout: bool,
    pub damage: Vec<Area>,
    pub cursor_image: bool,
    pub cursor_position: bool,
}

/// What a watcher has not heard of.
#[derive(Debug, Default)]
pub(super) struct News {
    pub outputs: bool,
    pub each: [Changes; OUTPUTS],
    /// Number of the last flush that is in it.
    pub serial: u64,
}

#[derive(Debug, Default)]
struct Inner {
    news: News,
    /// The last flush that it is done with.
    released: u64,
    /// The last flush that it was told of.
    told: u64,
    /// It let a fence wait for too long, and paces nothing until it has caught up.
    lagging: bool,
}

/// One watcher.
#[derive(Debug)]
pub(super) struct Watch {
    inner: Mutex<Inner>,
    /// Readable while there is news.
    pub ready: EventFd,
    paces: bool,
}

impl Watch {
    /// A watcher that has heard of nothing.
    pub fn new(ready: EventFd, paces: bool) -> Self {
        let everything = Changes {
            scanout: true,
            cursor_image: true,
            cursor_position: true,
            ..Default::default()
        };
        let watch = Self {
            inner: Mutex::default(),
            ready,
            paces,
        };
        watch.change(|inner| {
            inner.news.outputs = true;
            inner.news.each = std::array::from_fn(|_| everything.clone());
        });
        watch
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.lock());
        if let Err(error) = self.ready.write(1) {
            tracing::error!(%error, "cannot wake who watches the display");
        }
    }

    /// What happened since the last call.
    pub fn take(&self) -> News {
        let _ = self.ready.read();
        let mut inner = self.lock();
        inner.told = inner.news.serial.max(inner.told);
        mem::take(&mut inner.news)
    }

    /// What all outputs show is news again.
    pub fn repeat_scanouts(&self) {
        self.change(|inner| {
            for changes in &mut inner.news.each {
                changes.scanout = true;
            }
        });
    }

    /// The watcher is done with flush `serial` and all before it.
    pub fn release(&self, serial: u64) {
        let mut inner = self.lock();
        inner.released = inner.released.max(serial);
        if inner.released >= inner.told {
            inner.lagging = false;
        }
    }

    fn flushed(&self, output: usize, area: Area, serial: u64) -> bool {
        self.change(|inner| {
            inner.news.serial = serial;
            let damage = &mut inner.news.each[output].damage;
            damage.push(area);
            if damage.len() > MAX_DAMAGE {
                let whole = damage.iter().fold(area, |sum, area| sum.union(area));
                *damage = vec![whole];
            }
        });
        self.paces && !self.lock().lagging
    }

    fn is_done_with(&self, serial: u64) -> bool {
        let inner = self.lock();
        inner.lagging || inner.released >= serial
    }
}

/// All watchers.
#[derive(Debug, Default)]
pub(super) struct Watches {
    all: Vec<Weak<Watch>>,
    serial: u64,
}

impl Watches {
    pub fn add(&mut self, watch: &Arc<Watch>) {
        self.all.retain(|watch| watch.strong_count() > 0);
        self.all.push(Arc::downgrade(watch));
    }

    fn each(&self, mut tell: impl FnMut(&Arc<Watch>)) {
        for watch in &self.all {
            if let Some(watch) = watch.upgrade() {
                tell(&watch);
            }
        }
    }

    /// An output was plugged in, pulled or resized.
    pub fn outputs(&self) {
        self.each(|watch| watch.change(|inner| inner.news.outputs = true));
    }

    /// An output shows another image, or the same in other memory, or none.
    pub fn scanout(&self, output: usize) {
        self.each(|watch| {
            watch.change(|inner| {
                let changes = &mut inner.news.each[output];
                changes.scanout = true;
                changes.damage.clear();
            });
        });
    }

    /// An output's cursor looks different.
    pub fn cursor_image(&self, output: usize) {
        self.each(|watch| watch.change(|inner| inner.news.each[output].cursor_image = true));
    }

    /// An output's cursor is elsewhere.
    pub fn cursor_position(&self, output: usize) {
        self.each(|watch| watch.change(|inner| inner.news.each[output].cursor_position = true));
    }

    /// A flush is about to be told of.
    pub fn next_flush(&mut self) -> Hold {
        self.serial += 1;
        Hold {
            serial: self.serial,
            watches: Vec::new(),
        }
    }

    /// Something of an output was drawn; `hold` learns who must release it.
    pub fn flushed(&self, output: usize, area: Area, hold: &mut Hold) {
        self.each(|watch| {
            if watch.flushed(output, area, hold.serial) {
                hold.watches.push(Arc::downgrade(watch));
            }
        });
    }
}

/// Those who must release a flush before its fence is signalled.
#[derive(Debug)]
pub struct Hold {
    serial: u64,
    watches: Vec<Weak<Watch>>,
}

impl Hold {
    /// Whether nobody is waited for any more. Who has gone is not waited for.
    pub fn is_over(&self) -> bool {
        let waiting = |watch: &Weak<Watch>| {
            watch
                .upgrade()
                .is_some_and(|watch| !watch.is_done_with(self.serial))
        };
        !self.watches.iter().any(waiting)
    }

    /// Waits for nobody any more: who is not done lags.
    pub fn give_up(&self) {
        for watch in self.watches.iter().filter_map(Weak::upgrade) {
            let mut inner = watch.lock();
            if inner.released < self.serial {
                inner.lagging = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn area(x: u32) -> Area {
        Area {
            x,
            y: 0,
            width: 1,
            height: 1,
        }
    }

    fn watch(watches: &mut Watches, paces: bool) -> Arc<Watch> {
        let watch = Arc::new(Watch::new(EventFd::new(EFD_NONBLOCK).unwrap(), paces));
        watches.add(&watch);
        watch
    }

    #[test]
    fn news_is_merged_and_bounded() {
        let mut watches = Watches::default();
        let watch = watch(&mut watches, false);
        assert!(watch.take().outputs);
        for x in 0..100 {
            let mut hold = watches.next_flush();
            watches.flushed(3, area(x), &mut hold);
            assert!(hold.is_over());
        }
        let news = watch.take();
        assert!(news.each[3].damage.len() <= MAX_DAMAGE);
        let whole = news.each[3].damage.iter().copied();
        assert_eq!(whole.reduce(|a, b| a.union(&b)).unwrap().width, 100);
        assert_eq!(news.serial, 100);
        assert!(watch.take().each[3].damage.is_empty());
    }

    #[test]
    fn a_pacing_watcher_holds_fences_until_it_lags() {
        let mut watches = Watches::default();
        let watch = watch(&mut watches, true);
        watch.take();
        let flush = |watches: &mut Watches| {
            let mut hold = watches.next_flush();
            watches.flushed(0, area(0), &mut hold);
            hold
        };
        let first = flush(&mut watches);
        assert!(!first.is_over());
        let serial = watch.take().serial;
        watch.release(serial);
        assert!(first.is_over());

        let second = flush(&mut watches);
        second.give_up();
        assert!(flush(&mut watches).is_over(), "who lags holds nothing");
        let serial = watch.take().serial;
        watch.release(serial);
        let fourth = flush(&mut watches);
        assert!(!fourth.is_over(), "who caught up paces again");
        drop(watch);
        assert!(fourth.is_over(), "who left is not waited for");
    }
}
