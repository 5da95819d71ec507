//! A display stream: what changes, as it changes, to one watcher, and what that one does.
//!
//! News is merged in the display until the watcher's socket takes it, so a watcher that does not read costs
//! nothing more than one that does.

use std::{
    collections::BTreeMap,
    io, mem,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    thread,
};

use fanlight_api::{
    display::{DisplayUpdate, ExportedCursor, ViewerMessage},
    stream::{MessageStream, StreamError},
};
use fanlight_devices::{
    error_line,
    virtio::gpu::{
        CURSOR_SIZE, CursorImage, DisplayError, DisplayEvent, DisplayHandle, DisplaySubscriber,
        ExportedFrame, Frame, FrameCopy, FrameError, Location, Mode,
    },
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{MemfdFlags, memfd_create},
};

use super::api::{Driver, Slot, described, outputs};
use crate::display::input::Inputs;

/// Serves a watcher on a thread of its own; its end of the socket.
pub fn start(
    display: DisplayHandle,
    subscription: DisplaySubscriber,
    inputs: Option<(Driver, Inputs)>,
    slot: Slot,
) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut server = Server {
        stream: MessageStream::new(ours)?,
        subscription,
        display,
        inputs,
        copies: BTreeMap::new(),
        copies_devices: false,
        _slot: slot,
    };
    thread::Builder::new()
        .name("display-stream".into())
        .spawn(move || {
            let ended = loop {
                if let Err(error) = server.turn() {
                    break error;
                }
            };
            if let Some((_, inputs)) = &server.inputs {
                inputs.release_all();
            }
            if !matches!(ended, StreamError::Closed) {
                tracing::warn!("a display stream ended: {}", error_line(&ended));
            }
        })?;
    Ok(theirs.into())
}

struct Server {
    stream: MessageStream,
    subscription: DisplaySubscriber,
    display: DisplayHandle,
    inputs: Option<(Driver, Inputs)>,
    /// What outputs show of which there is no dma-buf, or none that the watcher can use.
    copies: BTreeMap<usize, FrameCopy>,
    /// Whether the watcher wants copies of what is in memory of passed-through devices.
    copies_devices: bool,
    _slot: Slot,
}

impl Server {
    /// Waits for news or for the watcher, and serves both.
    fn turn(&mut self) -> Result<(), StreamError> {
        let full = self.stream.is_full();
        let wanted = if full {
            PollFlags::IN | PollFlags::OUT
        } else {
            PollFlags::IN
        };
        let mut fds = [
            PollFd::from_borrowed_fd(self.stream.as_fd(), wanted),
            PollFd::from_borrowed_fd(self.subscription.as_fd(), PollFlags::IN),
        ];
        // What does not fit stays in the display, where it is merged.
        let waiting = if full { &mut fds[..1] } else { &mut fds[..] };
        match poll(waiting, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
        let [watcher, news] = [&fds[0], &fds[1]].map(|fd| !fd.revents().is_empty());
        if watcher {
            self.stream.flush()?;
            for (says, _) in self.stream.receive::<ViewerMessage>()? {
                self.obey(says);
            }
        }
        if news && !full {
            for event in self.subscription.events() {
                let (news, fds) = self.tell(event);
                self.stream.send(&news, fds)?;
            }
        }
        Ok(())
    }

    fn tell(&mut self, event: DisplayEvent) -> (DisplayUpdate, Vec<OwnedFd>) {
        match event {
            DisplayEvent::Outputs => (DisplayUpdate::Outputs(outputs(&self.display)), vec![]),
            DisplayEvent::Scanout {
                output,
                frame,
                gone,
            } => {
                let (picture, error, fds) = match self.picture(output, frame) {
                    None => {
                        let why = gone.then(|| DisplayError::Gone(output).to_string());
                        (None, why, vec![])
                    }
                    Some(Ok(image)) => (Some(described(&image)), None, vec![image.fd]),
                    Some(Err(error)) => (None, Some(error_line(&error)), vec![]),
                };
                let output = output as u32;
                let news = DisplayUpdate::Scanout {
                    output,
                    frame: picture,
                    error,
                };
                (news, fds)
            }
            DisplayEvent::Damage {
                output,
                areas,
                serial,
            } => {
                if let Some(copy) = self.copies.get(&output)
                    && let Err(error) = copy.update(&areas)
                {
                    tracing::debug!("a frame is not copied: {}", error_line(&error));
                }
                let areas = areas
                    .iter()
                    .map(|area| [area.x, area.y, area.width, area.height])
                    .collect();
                let output = output as u32;
                let news = DisplayUpdate::Damage {
                    output,
                    areas,
                    serial,
                };
                (news, vec![])
            }
            DisplayEvent::CursorImage { output, image } => {
                let look = image.and_then(|image| {
                    cursor(&image)
                        .inspect_err(|error| tracing::warn!(%error, "a cursor cannot be passed on"))
                        .ok()
                });
                let (look, fds) = match look {
                    Some((look, fd)) => (Some(look), vec![fd]),
                    None => (None, vec![]),
                };
                let output = output as u32;
                (
                    DisplayUpdate::CursorImage {
                        output,
                        image: look,
                    },
                    fds,
                )
            }
            DisplayEvent::CursorPosition { output, x, y } => {
                let output = output as u32;
                (DisplayUpdate::CursorPosition { output, x, y }, vec![])
            }
        }
    }

    /// What an output shows, in a dma-buf, or copied where there can be none or the watcher cannot use it.
    fn picture(
        &mut self,
        output: usize,
        frame: Option<Frame>,
    ) -> Option<Result<ExportedFrame, FrameError>> {
        let old = self.copies.remove(&output);
        let frame = frame?;
        if !(self.copies_devices && frame.location == Location::Device) {
            let exported = self.display.export(&frame);
            if !matches!(exported, Err(FrameError::Export(_))) {
                return Some(exported);
            }
        }
        let copied = old.and_then(|mut copy| match copy.replace(&frame)? {
            Ok(()) => Some(Ok(copy)),
            Err(error) => Some(Err(error)),
        });
        let copied = copied.unwrap_or_else(|| self.display.copy(frame));
        Some(copied.and_then(|copy| {
            let image = copy.image();
            self.copies.insert(output, copy);
            image
        }))
    }

    fn obey(&mut self, says: ViewerMessage) {
        match says {
            ViewerMessage::Release { serial } => return self.subscription.release(serial),
            ViewerMessage::CopyDeviceMemory => {
                if !mem::replace(&mut self.copies_devices, true) {
                    self.subscription.repeat_scanouts();
                }
                return;
            }
            _ => {}
        }
        let Some((_, inputs)) = &self.inputs else {
            return;
        };
        match says {
            ViewerMessage::Resize {
                output,
                width,
                height,
            } => {
                let mode = Mode { width, height };
                if let Err(error) = self.display.set_output(output as usize, Some(mode)) {
                    tracing::info!("a viewer's window: {}", error_line(&error));
                }
            }
            other => inputs.take(&other),
        }
    }
}

/// A cursor's look in a memory file, in the format that compositors know.
fn cursor(image: &CursorImage) -> io::Result<(ExportedCursor, OwnedFd)> {
    let fd = memfd_create("fanlight-cursor", MemfdFlags::CLOEXEC)?;
    let mut argb = image.rgba.clone();
    for pixel in argb.as_chunks_mut::<4>().0 {
        pixel.swap(0, 2);
    }
    let mut file = std::fs::File::from(fd);
    io::Write::write_all(&mut file, &argb)?;
    io::Seek::rewind(&mut file)?;
    let look = ExportedCursor {
        fd: 0,
        width: CURSOR_SIZE,
        height: CURSOR_SIZE,
        hot_x: image.hot_x,
        hot_y: image.hot_y,
    };
    Ok((look, file.into()))
}
