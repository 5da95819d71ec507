//! What happens on a display, for those who follow it.

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
    /// Starts to watch, with everything as it is now as the first news. Who `paces` holds the guest's fenced
    /// flushes back, for a short time at most, until it releases them.
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
    /// An output shows another image, or the same in other memory, or none.
    Scanout {
        /// The output.
        output: usize,
        /// What it shows.
        frame: Option<Frame>,
        /// Whether it shows something that is not there for the moment: see [`Gone`](super::display::DisplayError::Gone).
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
    /// A cursor looks different.
    CursorImage {
        /// The output.
        output: usize,
        /// What it looks like; nothing while it is hidden.
        image: Option<Arc<CursorImage>>,
    },
    /// A cursor is elsewhere.
    CursorPosition {
        /// The output.
        output: usize,
        /// Where its image's upper left corner is, from the left.
        x: i32,
        /// The same from the top.
        y: i32,
    },
}

/// One watcher's view of a display. Dropping ends it.
#[derive(Debug)]
pub struct DisplaySubscriber {
    /// Goes first.
    subscriber: Arc<Subscriber>,
    display: WakingHandle,
}

/// Wakes the device when dropped: nobody waits for a watcher that has gone.
#[derive(Debug)]
struct WakingHandle(DisplayHandle);

impl Drop for WakingHandle {
    fn drop(&mut self) {
        self.0.0.wake_device();
    }
}

impl DisplaySubscriber {
    /// What happened since the last call, as it is now. Nothing that was overtaken is told.
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

    /// Has the next [`Self::events`] tell once more what each output shows.
    pub fn repeat_scanouts(&self) {
        self.subscriber.repeat_scanouts();
    }

    /// The watcher is done with everything up to the damage of this serial.
    pub fn release(&self, serial: u64) {
        self.subscriber.release(serial);
        self.display.0.0.wake_device();
    }
}

impl AsFd for DisplaySubscriber {
    /// Readable while there is news.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the event descriptor is open for as long as the borrow of the watch that owns it.
        unsafe { BorrowedFd::borrow_raw(self.subscriber.ready.as_raw_fd()) }
    }
}
