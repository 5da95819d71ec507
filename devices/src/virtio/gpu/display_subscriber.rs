//! Events of a display, for those who follow it.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::Arc,
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    cursor::CursorImage, display::DisplayHandle, frame::Frame, geometry::Area,
    subscriber::Subscriber,
};

impl DisplayHandle {
    /// Subscribes. The first events tell the whole present state. A subscriber that `paces` delays fenced flushes
    /// of the guest until it releases them, for [`super::MAX_FENCE_DELAY`] at most.
    pub fn subscribe(&self, paces: bool) -> io::Result<DisplaySubscriber> {
        let subscriber = Arc::new(Subscriber::new(EventFd::new(EFD_NONBLOCK)?, paces));
        self.0.state.lock().subscribers.add(&subscriber);
        Ok(DisplaySubscriber {
            subscriber,
            display: WakingHandle(self.clone()),
        })
    }
}

/// What happened on a display.
#[derive(Clone, Debug)]
pub enum DisplayEvent {
    /// Outputs were plugged in, pulled or resized: see [`DisplayHandle::outputs`].
    Outputs,
    /// An output shows another resource, or the same in other memory, or none.
    Scanout {
        /// The output.
        output: usize,
        /// What it shows.
        frame: Option<Frame>,
        /// Whether it shows memory that is off for the moment: see
        /// [`DisplayError::Gone`](super::DisplayError::Gone).
        gone: bool,
    },
    /// The guest drew.
    Damage {
        /// The output.
        output: usize,
        /// Where, on the output.
        areas: Vec<Area>,
        /// To be given to [`DisplaySubscriber::release`].
        serial: u64,
    },
    /// The image of a cursor changed.
    CursorImage {
        /// The output.
        output: usize,
        /// What it looks like; nothing while it is hidden.
        image: Option<Arc<CursorImage>>,
    },
    /// A cursor moved.
    CursorPosition {
        /// The output.
        output: usize,
        /// Where the upper left corner of its image is, from the left.
        x: i32,
        /// The same from the top.
        y: i32,
    },
}

/// The events of a display for one subscriber. Dropping unsubscribes.
#[derive(Debug)]
pub struct DisplaySubscriber {
    /// Dropped first.
    subscriber: Arc<Subscriber>,
    display: WakingHandle,
}

/// Wakes the device when dropped: no frame waits for a subscriber that has gone.
#[derive(Debug)]
struct WakingHandle(DisplayHandle);

impl Drop for WakingHandle {
    fn drop(&mut self) {
        self.0.0.wake_device();
    }
}

impl DisplaySubscriber {
    /// What happened since the last call, merged: events that were superseded are left out.
    pub fn events(&self) -> Vec<DisplayEvent> {
        let update = self.subscriber.take();
        let mut events = Vec::new();
        if update.modes {
            events.push(DisplayEvent::Outputs);
        }
        let state = self.display.0.0.state.lock();
        for (output, changes) in update.outputs.into_iter().enumerate() {
            if changes.scanout {
                let frame = state.frame(output);
                let gone = frame.is_none() && state.is_gone(output);
                events.push(DisplayEvent::Scanout {
                    output,
                    frame,
                    gone,
                });
            }
            if !changes.damage.is_empty() {
                events.push(DisplayEvent::Damage {
                    output,
                    areas: changes.damage,
                    serial: update.serial,
                });
            }
            let cursor = &state.cursors[output];
            if changes.cursor_image {
                let image = cursor.image.clone();
                events.push(DisplayEvent::CursorImage { output, image });
            }
            if changes.cursor_position {
                let (x, y) = (cursor.x, cursor.y);
                events.push(DisplayEvent::CursorPosition { output, x, y });
            }
        }
        events
    }

    /// Makes the next [`Self::events`] tell again what each output shows.
    pub fn repeat_scanouts(&self) {
        self.subscriber.repeat_scanouts();
    }

    /// The subscriber is done with all damage up to this serial.
    pub fn release(&self, serial: u64) {
        self.subscriber.release(serial);
        self.display.0.0.wake_device();
    }
}

impl AsFd for DisplaySubscriber {
    /// Readable while there are events.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the event descriptor is open for as long as the borrow of the subscriber that owns it.
        unsafe { BorrowedFd::borrow_raw(self.subscriber.ready.as_raw_fd()) }
    }
}
