//! Between a display stream and a window.

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
    picture::{CursorPicture, Picture},
    window::{Window, WindowError, WindowEvent},
};

/// The size of a window before the guest has said what it shows.
const FIRST_SIZE: (u32, u32) = (1280, 800);
/// A cursor has so many bytes at most.
const MAX_CURSOR: u64 = 1 << 20;

/// Why there is nothing to see.
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
    #[error("the server sent no descriptor with a picture")]
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
    let watch = SubscribeDisplay {
        gpu,
        pace: true,
        drive: true,
    };
    let (stream, fds) = client
        .call_with::<DisplaySubscribe>(&watch, &[])
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

/// The descriptor at a place among those of a message.
fn take(fds: Vec<OwnedFd>, place: u32) -> Result<OwnedFd, ViewError> {
    fds.into_iter()
        .nth(place as usize)
        .ok_or(ViewError::NoDescriptor)
}

struct View {
    stream: MessageStream,
    window: Window,
    output: u32,
    drives: bool,
}

impl View {
    /// Waits for one of both sides and serves both. Whether to go on.
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
        let heard = !fds[0].revents().is_empty();
        if heard {
            self.stream.flush()?;
            for (news, fds) in self.stream.receive::<DisplayUpdate>()? {
                self.take_news(news, fds)?;
            }
        }
        for event in self.window.dispatch()? {
            if event == WindowEvent::Closed {
                return Ok(false);
            }
            self.pass_on(event)?;
        }
        Ok(true)
    }

    fn take_news(&mut self, news: DisplayUpdate, fds: Vec<OwnedFd>) -> Result<(), ViewError> {
        match news {
            DisplayUpdate::Scanout {
                output,
                frame: picture,
                error,
            } if output == self.output => {
                if let Some(error) = error {
                    tracing::warn!("the guest's picture cannot be had: {error}");
                }
                let picture = picture
                    .map(|described| picture_of(described, fds))
                    .transpose()?;
                self.window.show(picture)?;
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
            DisplayUpdate::CursorImage {
                output,
                image: look,
            } if output == self.output => {
                let picture = look.map(|look| cursor_of(&look, fds)).transpose()?;
                self.window.set_cursor(picture)?;
            }
            // The host's pointer is where the guest was told that it is.
            DisplayUpdate::CursorPosition { .. }
            | DisplayUpdate::Outputs(_)
            | DisplayUpdate::Scanout { .. }
            | DisplayUpdate::CursorImage { .. } => {}
        }
        Ok(())
    }

    fn pass_on(&mut self, event: WindowEvent) -> Result<(), ViewError> {
        let output = self.output;
        let says = match event {
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
        Ok(self.stream.send(&says, vec![])?)
    }
}

fn clamped(pixels: u32) -> i32 {
    i32::try_from(pixels).unwrap_or(i32::MAX)
}

fn picture_of(described: ExportedFrame, fds: Vec<OwnedFd>) -> Result<Picture, ViewError> {
    Ok(Picture {
        fd: take(fds, described.fd)?,
        width: described.width,
        height: described.height,
        stride: described.stride,
        offset: u32::try_from(described.offset)
            .map_err(|_| io::Error::other("a picture is too far into its dma-buf"))?,
        fourcc: described.fourcc,
        modifier: described.modifier,
        mappable: described.memory == FrameMemory::Shared
            || described.location != PixelLocation::Device,
    })
}

fn cursor_of(look: &ExportedCursor, fds: Vec<OwnedFd>) -> Result<CursorPicture, ViewError> {
    let mut pixels = Vec::new();
    File::from(take(fds, look.fd)?)
        .take(MAX_CURSOR)
        .read_to_end(&mut pixels)?;
    Ok(CursorPicture {
        width: look.width,
        height: look.height,
        hot_x: look.hot_x,
        hot_y: look.hot_y,
        pixels,
    })
}
