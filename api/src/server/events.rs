//! Events and their subscribers.

use std::sync::{Arc, Mutex, Weak};

use rustix::time::{ClockId, clock_gettime};

use super::connection::{Connection, locked};
use crate::types::{Event, EventName, VmEnding};

/// Publishes events. Clones share subscribers and numbers.
#[derive(Clone, Debug, Default)]
pub struct Events(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    sequence: u64,
    subscribers: Vec<Weak<Connection>>,
}

impl Events {
    /// Something happened.
    pub fn publish(&self, event: EventName) {
        self.publish_with(event, None, None);
    }

    /// Something happened to a device.
    pub fn publish_device(&self, event: EventName, device: &str) {
        self.publish_with(event, Some(device.to_owned()), None);
    }

    /// The machine ended.
    pub fn publish_ending(&self, ending: VmEnding) {
        self.publish_with(EventName::Shutdown, None, Some(ending));
    }

    fn publish_with(&self, event: EventName, device: Option<String>, ending: Option<VmEnding>) {
        // Numbers, times and the order on every connection agree: one lock for all.
        let mut state = locked(&self.0);
        state.sequence += 1;
        let event = Event {
            sequence: state.sequence,
            monotonic_ns: monotonic_ns(),
            lost: 0,
            event,
            device,
            ending,
        };
        state.subscribers.retain(|subscriber| {
            let subscriber = subscriber.upgrade();
            if let Some(connection) = &subscriber {
                connection.event(&event);
            }
            subscriber.is_some()
        });
    }

    /// Sends `connection` what happens from now on; `answer` gets the number of the last event before, and
    /// is called before the next.
    pub(super) fn subscribe(
        &self,
        connection: &Arc<Connection>,
        events: Option<Vec<EventName>>,
        answer: impl FnOnce(u64),
    ) {
        let mut state = locked(&self.0);
        // Subscribers that come and go between two events must not pile up.
        let there = |subscriber: &Weak<Connection>| subscriber.strong_count() > 0;
        state.subscribers.retain(there);
        let known = Arc::downgrade(connection);
        if !state.subscribers.iter().any(|other| other.ptr_eq(&known)) {
            state.subscribers.push(known);
        }
        connection.subscribe(events);
        answer(state.sequence);
    }
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    (now.tv_sec as u64) * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::{super::connection::Wake, *};

    #[test]
    fn subscribers_that_went_do_not_pile_up() {
        let events = Events::default();
        let wake = Arc::new(Wake::new().unwrap());
        for token in 0..1000 {
            events.subscribe(&Connection::new(wake.clone(), token), None, |_| {});
        }
        assert_eq!(events.0.lock().unwrap().subscribers.len(), 1);
    }
}
