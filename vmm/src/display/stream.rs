//! A display stream: updates of the display to one viewer, and input from it.
//!
//! The display merges updates until the viewer's socket takes them. So a viewer that does not read costs no memory.

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
    memory::Charge,
    virtio::gpu::{
        CURSOR_SIZE, CursorImage, DisplayError, DisplayEvent, DisplayHandle, DisplaySubscriber,
        ExportedFrame, Frame, FrameCopy, FrameError, Location, Mode,
    },
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{MemfdFlags, memfd_create},
};

use crate::display::{input::Inputs, messages};

/// Serves a viewer on a thread of its own. Returns the viewer's end of the socket.
///
/// `inputs` are the input devices, for the viewer that drives. The stream keeps both charges until it ends.
pub fn start(
    display: DisplayHandle,
    subscriber: DisplaySubscriber,
    inputs: Option<(Charge, Inputs)>,
    open: Charge,
) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut server = Server {
        stream: MessageStream::new(ours)?,
        subscriber,
        display,
        inputs,
        copies: BTreeMap::new(),
        copies_devices: false,
        _open: open,
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
    subscriber: DisplaySubscriber,
    display: DisplayHandle,
    inputs: Option<(Charge, Inputs)>,
    /// Copies of frames that have no dma-buf, or none that the viewer can use, by output.
    copies: BTreeMap<usize, FrameCopy>,
    /// Whether the viewer wants copies of frames in memory of passed-through devices.
    copies_devices: bool,
    _open: Charge,
}

impl Server {
    /// Waits for the display or for the viewer, and serves both.
    fn turn(&mut self) -> Result<(), StreamError> {
        let full = self.stream.is_full();
        let wanted = if full {
            PollFlags::IN | PollFlags::OUT
        } else {
            PollFlags::IN
        };
        let mut fds = [
            PollFd::from_borrowed_fd(self.stream.as_fd(), wanted),
            PollFd::from_borrowed_fd(self.subscriber.as_fd(), PollFlags::IN),
        ];
        // While the socket takes no more, updates stay in the display, which merges them.
        let waiting = if full { &mut fds[..1] } else { &mut fds[..] };
        match poll(waiting, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
        let [viewer, updates] = [&fds[0], &fds[1]].map(|fd| !fd.revents().is_empty());
        if viewer {
            self.stream.flush()?;
            for (message, _) in self.stream.receive::<ViewerMessage>()? {
                self.receive(message);
            }
        }
        if updates && !full {
            for event in self.subscriber.events() {
                let (update, fds) = self.update(event);
                self.stream.send(&update, fds)?;
            }
        }
        Ok(())
    }

    /// An event of the display as a message, with its descriptors.
    fn update(&mut self, event: DisplayEvent) -> (DisplayUpdate, Vec<OwnedFd>) {
        match event {
            DisplayEvent::Outputs => {
                let outputs = messages::outputs(&self.display);
                (DisplayUpdate::Outputs(outputs), vec![])
            }
            DisplayEvent::Scanout {
                output,
                frame,
                gone,
            } => {
                let (frame, error, fds) = match self.export(output, frame) {
                    None => {
                        let why = gone.then(|| DisplayError::Gone(output).to_string());
                        (None, why, vec![])
                    }
                    Some(Ok(frame)) => (Some(messages::frame(&frame)), None, vec![frame.fd]),
                    Some(Err(error)) => (None, Some(error_line(&error)), vec![]),
                };
                let output = output as u32;
                let update = DisplayUpdate::Scanout {
                    output,
                    frame,
                    error,
                };
                (update, fds)
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
                let update = DisplayUpdate::Damage {
                    output,
                    areas,
                    serial,
                };
                (update, vec![])
            }
            DisplayEvent::CursorImage { output, image } => {
                let exported = image.and_then(|image| {
                    export_cursor(&image)
                        .inspect_err(|error| tracing::warn!(%error, "cannot export a cursor image"))
                        .ok()
                });
                let output = output as u32;
                let (image, fds) = match exported {
                    Some((image, fd)) => (Some(image), vec![fd]),
                    None => (None, vec![]),
                };
                (DisplayUpdate::CursorImage { output, image }, fds)
            }
            DisplayEvent::CursorPosition { output, x, y } => {
                let output = output as u32;
                (DisplayUpdate::CursorPosition { output, x, y }, vec![])
            }
        }
    }

    /// A frame as a dma-buf, or as a copy if it has none or the viewer cannot use it.
    fn export(
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

    fn receive(&mut self, message: ViewerMessage) {
        match message {
            ViewerMessage::Release { serial } => self.subscriber.release(serial),
            ViewerMessage::CopyDeviceMemory => {
                if !mem::replace(&mut self.copies_devices, true) {
                    self.subscriber.repeat_scanouts();
                }
            }
            ViewerMessage::Resize {
                output,
                width,
                height,
            } => {
                if self.inputs.is_some() {
                    self.resize(output, Mode { width, height });
                }
            }
            ViewerMessage::Key { .. }
            | ViewerMessage::Pointer { .. }
            | ViewerMessage::Unfocused
            | ViewerMessage::Button { .. }
            | ViewerMessage::Wheel { .. }
            | ViewerMessage::Touch { .. } => {
                if let Some((_, inputs)) = &self.inputs {
                    inputs.take(&message);
                }
            }
        }
    }

    fn resize(&self, output: u32, mode: Mode) {
        if let Err(error) = self.display.set_output(output as usize, Some(mode)) {
            tracing::info!("a viewer cannot resize an output: {}", error_line(&error));
        }
    }
}

/// A cursor image in a memory file, in the byte order of `DRM_FORMAT_ARGB8888`.
fn export_cursor(image: &CursorImage) -> io::Result<(ExportedCursor, OwnedFd)> {
    let fd = memfd_create("fanlight-cursor", MemfdFlags::CLOEXEC)?;
    let mut argb = image.rgba.clone();
    for pixel in argb.as_chunks_mut::<4>().0 {
        pixel.swap(0, 2);
    }
    let mut file = std::fs::File::from(fd);
    io::Write::write_all(&mut file, &argb)?;
    io::Seek::rewind(&mut file)?;
    let exported = ExportedCursor {
        fd: 0,
        width: CURSOR_SIZE,
        height: CURSOR_SIZE,
        hot_x: image.hot_x,
        hot_y: image.hot_y,
    };
    Ok((exported, file.into()))
}
