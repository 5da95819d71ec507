//! Subscribers of a display, and the updates that each has not read.
//!
//! Updates are merged, not queued: a subscriber that does not read costs no more than one that does. A subscriber
//! may pace the guest: a fenced flush is then answered when it releases the flush, or after [`MAX_FENCE_DELAY`]. A
//! subscriber that exceeds that paces nothing until it has caught up.

use std::{
    mem,
    sync::{Arc, MutexGuard, Weak},
    time::Duration,
};

use vmm_sys_util::eventfd::EventFd;

use super::{geometry::Area, output::OUTPUTS};

use crate::sync::Mutex;

/// The longest that subscribers delay a fence. Linux waits 50 ms for one.
pub const MAX_FENCE_DELAY: Duration = Duration::from_millis(40);
/// Rectangles that are kept apart; more are merged into one.
const MAX_DAMAGE: usize = 16;

/// Unread changes of one output.
#[derive(Clone, Debug, Default)]
pub struct OutputUpdate {
    pub scanout: bool,
    pub damage: Vec<Area>,
    pub cursor_image: bool,
    pub cursor_position: bool,
}

/// Unread changes of a display.
#[derive(Debug, Default)]
pub struct DisplayUpdate {
    pub modes: bool,
    pub outputs: [OutputUpdate; OUTPUTS],
    /// Number of the last flush in it.
    pub serial: u64,
}

#[derive(Debug, Default)]
struct Inner {
    update: DisplayUpdate,
    /// The last flush that it has released.
    released: u64,
    /// The last flush that it has read.
    told: u64,
    /// The last flush whose fence it let expire. It paces nothing until it has released this one and all that it has
    /// read.
    expired: Option<u64>,
}

/// One subscriber.
#[derive(Debug)]
pub struct Subscriber {
    inner: Mutex<Inner>,
    /// Readable while there is an update.
    pub ready: EventFd,
    paces: bool,
}

impl Subscriber {
    /// A subscriber that has read nothing.
    pub fn new(ready: EventFd, paces: bool) -> Self {
        let everything = OutputUpdate {
            scanout: true,
            cursor_image: true,
            cursor_position: true,
            ..Default::default()
        };
        let subscriber = Self {
            inner: Mutex::default(),
            ready,
            paces,
        };
        subscriber.change(|inner| {
            inner.update.modes = true;
            inner.update.outputs = std::array::from_fn(|_| everything.clone());
        });
        subscriber
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }

    fn change(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.lock());
        if let Err(error) = self.ready.write(1) {
            tracing::error!(%error, "cannot wake a subscriber of the display");
        }
    }

    /// The update since the last call.
    pub fn take(&self) -> DisplayUpdate {
        let _ = self.ready.read();
        let mut inner = self.lock();
        inner.told = inner.update.serial.max(inner.told);
        mem::take(&mut inner.update)
    }

    /// Marks what all outputs show as changed.
    pub fn repeat_scanouts(&self) {
        self.change(|inner| {
            for changes in &mut inner.update.outputs {
                changes.scanout = true;
            }
        });
    }

    /// The subscriber is done with flush `serial` and all before it.
    pub fn release(&self, serial: u64) {
        let mut inner = self.lock();
        inner.released = inner.released.max(serial);
        if inner
            .expired
            .is_some_and(|expired| inner.released >= expired.max(inner.told))
        {
            inner.expired = None;
        }
    }

    fn flushed(&self, output: usize, area: Area, serial: u64) -> bool {
        self.change(|inner| {
            inner.update.serial = serial;
            let damage = &mut inner.update.outputs[output].damage;
            damage.push(area);
            if damage.len() > MAX_DAMAGE {
                let whole = damage.iter().fold(area, |sum, area| sum.union(area));
                *damage = vec![whole];
            }
        });
        self.paces && self.lock().expired.is_none()
    }

    fn is_done_with(&self, serial: u64) -> bool {
        let inner = self.lock();
        inner.expired.is_some() || inner.released >= serial
    }
}

/// All subscribers.
#[derive(Debug, Default)]
pub struct Subscribers {
    all: Vec<Weak<Subscriber>>,
    serial: u64,
}

impl Subscribers {
    pub fn add(&mut self, subscriber: &Arc<Subscriber>) {
        self.all.retain(|subscriber| subscriber.strong_count() > 0);
        self.all.push(Arc::downgrade(subscriber));
    }

    fn each(&self, mut notify: impl FnMut(&Arc<Subscriber>)) {
        for subscriber in &self.all {
            if let Some(subscriber) = subscriber.upgrade() {
                notify(&subscriber);
            }
        }
    }

    /// An output was connected, disconnected or resized.
    pub fn outputs(&self) {
        self.each(|subscriber| subscriber.change(|inner| inner.update.modes = true));
    }

    /// An output shows another image, or the same in other memory, or none.
    pub fn scanout(&self, output: usize) {
        self.each(|subscriber| {
            subscriber.change(|inner| {
                let changes = &mut inner.update.outputs[output];
                changes.scanout = true;
                changes.damage.clear();
            });
        });
    }

    /// The image of a cursor changed.
    pub fn cursor_image(&self, output: usize) {
        self.each(|subscriber| {
            subscriber.change(|inner| inner.update.outputs[output].cursor_image = true)
        });
    }

    /// A cursor moved.
    pub fn cursor_position(&self, output: usize) {
        self.each(|subscriber| {
            subscriber.change(|inner| inner.update.outputs[output].cursor_position = true)
        });
    }

    /// The fence of the next flush.
    pub fn next_flush(&mut self) -> FlushFence {
        self.serial += 1;
        FlushFence {
            serial: self.serial,
            subscribers: Vec::new(),
        }
    }

    /// A part of an output was drawn. Adds to `fence` the subscribers that must release it.
    pub fn flushed(&self, output: usize, area: Area, fence: &mut FlushFence) {
        self.each(|subscriber| {
            if subscriber.flushed(output, area, fence.serial) {
                fence.subscribers.push(Arc::downgrade(subscriber));
            }
        });
    }
}

/// A fence that is signalled when pacing subscribers have released a flush.
#[derive(Debug)]
pub struct FlushFence {
    serial: u64,
    subscribers: Vec<Weak<Subscriber>>,
}

impl FlushFence {
    /// Whether no subscriber delays it any more. One that was dropped does not.
    pub fn is_signalled(&self) -> bool {
        let waiting = |subscriber: &Weak<Subscriber>| {
            subscriber
                .upgrade()
                .is_some_and(|subscriber| !subscriber.is_done_with(self.serial))
        };
        !self.subscribers.iter().any(waiting)
    }

    /// Stops waiting: subscribers that have not released the flush lag.
    pub fn expire(&self) {
        for subscriber in self.subscribers.iter().filter_map(Weak::upgrade) {
            let mut inner = subscriber.lock();
            if inner.released < self.serial {
                inner.expired = inner.expired.max(Some(self.serial));
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

    fn subscriber(subscribers: &mut Subscribers, paces: bool) -> Arc<Subscriber> {
        let subscriber = Arc::new(Subscriber::new(EventFd::new(EFD_NONBLOCK).unwrap(), paces));
        subscribers.add(&subscriber);
        subscriber
    }

    #[test]
    fn news_is_merged_and_bounded() {
        let mut subscribers = Subscribers::default();
        let subscriber = subscriber(&mut subscribers, false);
        assert!(subscriber.take().modes);
        for x in 0..100 {
            let mut fence = subscribers.next_flush();
            subscribers.flushed(3, area(x), &mut fence);
            assert!(fence.is_signalled());
        }
        let update = subscriber.take();
        assert!(update.outputs[3].damage.len() <= MAX_DAMAGE);
        let whole = update.outputs[3].damage.iter().copied();
        assert_eq!(whole.reduce(|a, b| a.union(&b)).unwrap().width, 100);
        assert_eq!(update.serial, 100);
        assert!(subscriber.take().outputs[3].damage.is_empty());
    }

    #[test]
    fn a_pacing_watcher_holds_fences_until_it_lags() {
        let mut subscribers = Subscribers::default();
        let subscriber = subscriber(&mut subscribers, true);
        subscriber.take();
        let flush = |subscribers: &mut Subscribers| {
            let mut fence = subscribers.next_flush();
            subscribers.flushed(0, area(0), &mut fence);
            fence
        };
        let first = flush(&mut subscribers);
        assert!(!first.is_signalled());
        let serial = subscriber.take().serial;
        subscriber.release(serial);
        assert!(first.is_signalled());

        let second = flush(&mut subscribers);
        second.expire();
        assert!(
            flush(&mut subscribers).is_signalled(),
            "who lags holds nothing"
        );
        subscriber.release(0);
        assert!(
            flush(&mut subscribers).is_signalled(),
            "who reads nothing does not catch up by releasing"
        );
        let serial = subscriber.take().serial;
        subscriber.release(serial - 1);
        assert!(
            flush(&mut subscribers).is_signalled(),
            "what was released is not all that was read"
        );
        let serial = subscriber.take().serial;
        subscriber.release(serial);
        let fourth = flush(&mut subscribers);
        assert!(!fourth.is_signalled(), "who caught up paces again");
        drop(subscriber);
        assert!(fourth.is_signalled(), "who left is not waited for");
    }
}
