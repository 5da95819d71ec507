//! The API's calls of a display: outputs, screenshots, exported frames and streams.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufWriter, Seek},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
};

use fanlight_api::{
    OutputMode,
    display::{
        DisplayStream, ExportedFrame, ExportedResource, Outputs, Screenshot, ScreenshotTaken,
        SetOutput, SubscribeDisplay,
    },
    gpu::OutputModeError,
};
use fanlight_devices::{
    memory::{Charge, Quota},
    virtio::gpu::{DisplayError, DisplayHandle, Mode, Pixels},
};
use rustix::fs::{MemfdFlags, memfd_create};
use thiserror::Error;

use crate::{
    display::{input::Inputs, messages, png::write_png, stream},
    host::files::open_at_once,
};

/// Streams of a display at a time.
const MAX_STREAMS: u64 = 16;
/// Calls of a display at a time. Each has a thread, and a screenshot can take a gigabyte.
const MAX_CALLS: u64 = 4;

/// Why a call of a display fails.
#[derive(Debug, Error)]
pub enum CallError {
    /// The display refuses it.
    #[error(transparent)]
    Display(#[from] DisplayError),
    /// Not a size of an output.
    #[error(transparent)]
    Mode(#[from] OutputModeError),
    /// [`MAX_CALLS`] are under way.
    #[error("{MAX_CALLS} calls of the display are being answered: try again")]
    TooManyCalls,
    /// [`MAX_STREAMS`] are open.
    #[error("{MAX_STREAMS} display streams are open: close one")]
    TooManyStreams,
    /// The file of a screenshot cannot be written.
    #[error("cannot write {}", path.display())]
    WriteFile {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The memory file of a screenshot cannot be made.
    #[error("cannot make a file")]
    MakeFile(#[source] io::Error),
    /// A stream has no socket or no thread.
    #[error("cannot start a display stream")]
    Stream(#[source] io::Error),
}

/// A display with the input devices of its viewers.
#[derive(Clone, Debug)]
pub struct Display {
    handle: DisplayHandle,
    inputs: Inputs,
    streams: Arc<Quota>,
    calls: Arc<Quota>,
    /// Of 1: the stream that drives.
    drivers: Arc<Quota>,
}

impl Display {
    /// The display of a GPU.
    pub fn new(handle: DisplayHandle, inputs: Inputs) -> Self {
        Self {
            handle,
            inputs,
            streams: Quota::new(MAX_STREAMS),
            calls: Quota::new(MAX_CALLS),
            drivers: Quota::new(1),
        }
    }

    /// Counts a call until the result is dropped.
    pub fn begin_call(&self) -> Result<Charge, CallError> {
        self.calls.charge(1).ok_or(CallError::TooManyCalls)
    }

    /// All outputs.
    pub fn outputs(&self) -> Outputs {
        messages::outputs(&self.handle)
    }

    /// Connects, resizes or disconnects an output.
    pub fn set_output(&self, params: &SetOutput) -> Result<Outputs, CallError> {
        let mode = params.mode.as_deref().map(str::parse::<OutputMode>);
        let mode = mode
            .transpose()?
            .map(|OutputMode { width, height }| Mode { width, height });
        self.handle.set_output(params.output as usize, mode)?;
        Ok(self.outputs())
    }

    /// Writes a PNG file of what an output shows. Without a path the file is a descriptor.
    pub fn screenshot(
        &self,
        params: &Screenshot,
    ) -> Result<(ScreenshotTaken, Option<OwnedFd>), CallError> {
        let pixels = self.handle.read_scanout(params.output as usize)?;
        let failed = |source: io::Error| match &params.file {
            Some(path) => CallError::WriteFile {
                path: path.clone(),
                source,
            },
            None => CallError::MakeFile(source),
        };
        let mut file = match &params.file {
            Some(path) => {
                let mut options = OpenOptions::new();
                let options = options.write(true).create(true).truncate(true);
                open_at_once(options, path).map_err(failed)?
            }
            None => memfd_create("fanlight-screenshot", MemfdFlags::CLOEXEC)
                .map_err(|error| failed(error.into()))?
                .into(),
        };
        write_file(&pixels, &file).map_err(failed)?;
        let bytes = file.stream_position().map_err(failed)?;
        file.rewind().map_err(failed)?;
        let fd = params.file.is_none().then(|| OwnedFd::from(file));
        let taken = ScreenshotTaken {
            width: pixels.width,
            height: pixels.height,
            bytes,
            fd: fd.as_ref().map(|_| 0),
        };
        Ok((taken, fd))
    }

    /// A dma-buf of what an output shows.
    pub fn export_scanout(&self, output: u32) -> Result<(ExportedFrame, OwnedFd), CallError> {
        let frame = self.handle.export_scanout(output as usize)?;
        Ok((messages::frame(&frame), frame.fd))
    }

    /// A dma-buf of a guest resource.
    pub fn export_resource(&self, id: u32) -> Result<(ExportedResource, OwnedFd), CallError> {
        let exported = self.handle.export_resource(id)?;
        let resource = ExportedResource {
            fd: 0,
            size: exported.size,
            location: messages::location(exported.location),
        };
        Ok((resource, exported.fd))
    }

    /// Starts a stream; the descriptor is the viewer's end of its socket.
    pub fn subscribe(
        &self,
        params: &SubscribeDisplay,
    ) -> Result<(DisplayStream, OwnedFd), CallError> {
        let open = self.streams.charge(1).ok_or(CallError::TooManyStreams)?;
        let driver = params.drive.then(|| self.drivers.charge(1)).flatten();
        let drives = driver.is_some();
        let inputs = driver.map(|driver| (driver, self.inputs.clone()));
        let subscriber = self
            .handle
            .subscribe(params.pace)
            .map_err(CallError::Stream)?;
        let fd = stream::start(self.handle.clone(), subscriber, inputs, open)
            .map_err(CallError::Stream)?;
        Ok((DisplayStream { fd: 0, drives }, fd))
    }
}

fn write_file(pixels: &Pixels, file: &File) -> io::Result<()> {
    let mut writer = BufWriter::new(file);
    write_png(pixels, &mut writer).map_err(io::Error::other)?;
    io::Write::flush(&mut writer)
}
