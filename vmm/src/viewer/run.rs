//! Carries frames from a display stream to the window, and input from the window to the stream.

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use fanlight_api::{
    client::{Client, ClientError},
    display::{
        DisplayUpdate, ExportedCursor, ExportedFrame, FrameMemory, PixelLocation, SubscribeDisplay,
        ViewerMessage,
    },
    methods::DisplaySubscribe,
    stream::{MessageStream, StreamError},
};
use rustix::event::{PollFd, PollFlags, poll};
use thiserror::Error;

use super::{
    events::WindowEvent,
    frame::{CursorImage, Frame},
    window::{Window, WindowError},
};

/// Width and height of the window in pixels before the first frame.
const FIRST_SIZE: (u32, u32) = (1280, 800);
/// The longest cursor image, in bytes.
const MAX_CURSOR: u64 = 1 << 20;

/// Why the view ends, or does not begin.
#[derive(Debug, Error)]
pub enum ViewError {
    /// The API.
    #[error("{}: cannot watch the display", path)]
    Api {
        /// The socket.
        path: String,
        /// The cause.
        #[source]
        source: ClientError,
    },
    /// The window.
    #[error(transparent)]
    Window(#[from] WindowError),
    /// The stream.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The server sent a message without its descriptor.
    #[error("the server sent no descriptor with a frame")]
    NoDescriptor,
    /// Waiting.
    #[error("cannot wait for the window")]
    Wait(#[from] io::Error),
}

/// Shows an output of a GPU until the window is closed or the machine ends.
pub fn run(socket: &Path, gpu: u32, output: u32) -> Result<(), ViewError> {
    let api = |source| ViewError::Api {
        path: socket.display().to_string(),
        source,
    };
    let mut client = Client::connect(socket).map_err(api)?;
    let params = SubscribeDisplay {
        gpu,
        pace: true,
        drive: true,
    };
    let (stream, fds) = client
        .call_with::<DisplaySubscribe>(&params, &[])
        .map_err(api)?;
    let fd = take(fds, stream.fd)?;
    if !stream.drives {
        tracing::warn!("another viewer drives the guest: this one shows, and sends no keys");
    }
    let mut view = View {
        stream: MessageStream::new(UnixStream::from(fd))?,
        window: Window::open("Fanlight", FIRST_SIZE.0, FIRST_SIZE.1)?,
        output,
        drives: stream.drives,
    };
    loop {
        match view.turn() {
            Ok(true) => {}
            Ok(false) | Err(ViewError::Stream(StreamError::Closed)) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// A message's descriptor of this index.
fn take(fds: Vec<OwnedFd>, index: u32) -> Result<OwnedFd, ViewError> {
    fds.into_iter()
        .nth(index as usize)
        .ok_or(ViewError::NoDescriptor)
}

struct View {
    stream: MessageStream,
    window: Window,
    output: u32,
    drives: bool,
}

impl View {
    /// Waits for the stream or the window, and serves both. `false` once the window is closed.
    fn turn(&mut self) -> Result<bool, ViewError> {
        let mut wanted = PollFlags::IN;
        if self.stream.is_full() {
            wanted |= PollFlags::OUT;
        }
        let mut fds = [
            PollFd::from_borrowed_fd(self.stream.as_fd(), wanted),
            PollFd::from_borrowed_fd(self.window.fd(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
        let readable = !fds[0].revents().is_empty();
        if readable {
            self.stream.flush()?;
            for (update, fds) in self.stream.receive::<DisplayUpdate>()? {
                self.show(update, fds)?;
            }
        }
        for event in self.window.dispatch()? {
            if event == WindowEvent::Closed {
                return Ok(false);
            }
            self.send(event)?;
        }
        Ok(true)
    }

    /// Shows an update of the display.
    fn show(&mut self, update: DisplayUpdate, fds: Vec<OwnedFd>) -> Result<(), ViewError> {
        match update {
            DisplayUpdate::Scanout {
                output,
                frame,
                error,
            } if output == self.output => {
                if let Some(error) = error {
                    tracing::warn!("the guest's frame cannot be shown: {error}");
                }
                let frame = frame.map(|frame| open_frame(&frame, fds)).transpose()?;
                self.window.show(frame)?;
            }
            DisplayUpdate::Damage {
                output,
                areas,
                serial,
            } => {
                if output == self.output {
                    let areas: Vec<_> = areas.iter().map(|area| area.map(clamped)).collect();
                    self.window.damage(&areas, serial)?;
                } else {
                    self.stream
                        .send(&ViewerMessage::Release { serial }, vec![])?;
                }
            }
            DisplayUpdate::CursorImage { output, image } if output == self.output => {
                let image = image.map(|image| read_cursor(&image, fds)).transpose()?;
                self.window.set_cursor(image)?;
            }
            // The host's pointer is already where it moved the guest's.
            DisplayUpdate::CursorPosition { .. }
            | DisplayUpdate::Outputs(_)
            | DisplayUpdate::Scanout { .. }
            | DisplayUpdate::CursorImage { .. } => {}
        }
        Ok(())
    }

    /// Sends an event of the window on the stream. Input is sent only by a stream that drives.
    fn send(&mut self, event: WindowEvent) -> Result<(), ViewError> {
        let output = self.output;
        let message = match event {
            WindowEvent::Shown { serial } => ViewerMessage::Release { serial },
            WindowEvent::Unreadable => ViewerMessage::CopyDeviceMemory,
            _ if !self.drives => return Ok(()),
            WindowEvent::Resized { width, height } => ViewerMessage::Resize {
                output,
                width,
                height,
            },
            WindowEvent::Key { code, pressed } => ViewerMessage::Key {
                code: u16::try_from(code).unwrap_or(0),
                pressed,
            },
            WindowEvent::Pointer { x, y } => ViewerMessage::Pointer { output, x, y },
            WindowEvent::Button { code, pressed } => ViewerMessage::Button {
                code: u16::try_from(code).unwrap_or(0),
                pressed,
            },
            WindowEvent::Wheel {
                horizontal,
                vertical,
            } => ViewerMessage::Wheel {
                horizontal,
                vertical,
            },
            WindowEvent::Touch { id, at } => ViewerMessage::Touch {
                output,
                finger: id,
                at: at.map(|(x, y)| [x, y]),
            },
            WindowEvent::Unfocused => ViewerMessage::Unfocused,
            WindowEvent::Closed => return Ok(()),
        };
        Ok(self.stream.send(&message, vec![])?)
    }
}

fn clamped(pixels: u32) -> i32 {
    i32::try_from(pixels).unwrap_or(i32::MAX)
}

/// A frame with its descriptor.
fn open_frame(described: &ExportedFrame, fds: Vec<OwnedFd>) -> Result<Frame, ViewError> {
    Ok(Frame {
        fd: take(fds, described.fd)?,
        width: described.width,
        height: described.height,
        stride: described.stride,
        offset: u32::try_from(described.offset)
            .map_err(|_| io::Error::other("a frame begins too far into its memory"))?,
        fourcc: described.fourcc,
        modifier: described.modifier,
        mappable: described.memory == FrameMemory::Shared
            || described.location != PixelLocation::Device,
    })
}

/// A cursor image with its pixels.
fn read_cursor(image: &ExportedCursor, fds: Vec<OwnedFd>) -> Result<CursorImage, ViewError> {
    let mut pixels = Vec::new();
    File::from(take(fds, image.fd)?)
        .take(MAX_CURSOR)
        .read_to_end(&mut pixels)?;
    Ok(CursorImage {
        width: image.width,
        height: image.height,
        hot_x: image.hot_x,
        hot_y: image.hot_y,
        pixels,
    })
}
