//! A connection to the Wayland compositor, with one window.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use thiserror::Error;
use wayland_client::{
    Connection, DispatchError, EventQueue,
    backend::WaylandError,
    globals::{BindError, GlobalError, registry_queue_init},
};

use super::{
    events::WindowEvent,
    frame::{CursorImage, Frame},
    state::State,
};

/// Why there is no window.
#[derive(Debug, Error)]
pub enum WindowError {
    /// No compositor.
    #[error(
        "no Wayland compositor: run this in a Wayland session, or set WAYLAND_DISPLAY to its socket"
    )]
    Connect(#[from] wayland_client::ConnectError),
    /// The compositor does not list its globals.
    #[error("the Wayland compositor does not answer")]
    Globals(#[from] GlobalError),
    /// The compositor lacks a global, or has it in an older version.
    #[error("the Wayland compositor lacks what a window needs")]
    Bind(#[from] BindError),
    /// The compositor ended the connection, or broke the protocol.
    #[error("the connection to the Wayland compositor broke")]
    Dispatch(#[from] DispatchError),
    /// The compositor ended the connection while it was sent to.
    #[error("the connection to the Wayland compositor broke")]
    Send(#[from] WaylandError),
    /// No memory for frames.
    #[error("cannot make memory for frames")]
    Memory(#[from] io::Error),
}

/// A window.
pub struct Window {
    connection: Connection,
    queue: EventQueue<State>,
    state: State,
}

impl Window {
    /// Opens a window of the given size.
    pub fn open(title: &str, width: u32, height: u32) -> Result<Self, WindowError> {
        let connection = Connection::connect_to_env()?;
        let (globals, mut queue) = registry_queue_init::<State>(&connection)?;
        let handle = queue.handle();
        let mut state = State::new(&globals, handle, title, (width, height))?;
        while !state.configured {
            queue.blocking_dispatch(&mut state)?;
        }
        state.show(None)?;
        Ok(Self {
            connection,
            queue,
            state,
        })
    }

    /// Readable when [`Self::dispatch`] has something to do.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    /// Handles events of the compositor, without waiting.
    pub fn dispatch(&mut self) -> Result<Vec<WindowEvent>, WindowError> {
        if let Some(guard) = self.queue.prepare_read() {
            match guard.read() {
                Err(WaylandError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => {
                    read?;
                }
            }
        }
        self.queue.dispatch_pending(&mut self.state)?;
        self.state.retry_failed()?;
        self.flush()?;
        Ok(std::mem::take(&mut self.state.events))
    }

    fn flush(&self) -> Result<(), WindowError> {
        match self.queue.flush() {
            // The rest is sent later, when the compositor reads again.
            Err(WaylandError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => Ok(result?),
        }
    }

    /// Shows another frame, or black.
    pub fn show(&mut self, frame: Option<Frame>) -> Result<(), WindowError> {
        self.state.show(frame)?;
        self.flush()
    }

    /// The frame changed: `areas` are x, y, width and height in its pixels.
    pub fn damage(&mut self, areas: &[[i32; 4]], serial: u64) -> Result<(), WindowError> {
        self.state.damage(areas, serial)?;
        self.flush()
    }

    /// The guest's cursor has another image, or is hidden.
    pub fn set_cursor(&mut self, image: Option<CursorImage>) -> Result<(), WindowError> {
        self.state.set_cursor(image)?;
        self.flush()
    }
}
