//! The display as the API offers it: pictures, outputs, and streams of what changes.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufWriter, Seek},
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use fanlight_api::{
    ApiError, ErrorKind, OutputMode,
    display::{
        self, DisplayStream, ExportedResource, OutputState, Outputs, PixelLocation, Screenshot,
        ScreenshotTaken, SetOutput, SubscribeDisplay,
    },
    server::Reply,
};
use fanlight_devices::{
    error_line,
    virtio::gpu::{
        DisplayError, DisplayHandle, ExportedFrame, FrameError, FrameMemory, Location, Mode, Pixels,
    },
};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::{
    display::{input::Inputs, png::write_png},
    host::files::open_at_once,
};

/// Streams at once.
const MAX_STREAMS: usize = 16;
/// Calls that are being answered at once: each has a thread, and a picture may have a gigabyte.
const MAX_CALLS: usize = 4;

/// A display and what a user does with it.
#[derive(Clone, Debug)]
pub struct Display {
    handle: DisplayHandle,
    inputs: Inputs,
    streams: Arc<AtomicUsize>,
    calls: Arc<AtomicUsize>,
    /// Whether a stream drives.
    driven: Arc<AtomicBool>,
}

impl Display {
    /// The display that a GPU shows its outputs on.
    pub fn new(handle: DisplayHandle, inputs: Inputs) -> Self {
        Self {
            handle,
            inputs,
            streams: Arc::default(),
            calls: Arc::default(),
            driven: Arc::default(),
        }
    }

    /// Has a call answered on a thread of its own.
    pub fn answer(&self, reply: Reply, work: impl FnOnce(&Self, Reply) + Send + 'static) {
        let Some(slot) = Slot::take(&self.calls, MAX_CALLS) else {
            let text = format!("{MAX_CALLS} calls of the display are being answered: try again");
            return reply.refuse(ApiError::new(ErrorKind::Busy, text));
        };
        let display = self.clone();
        // If it cannot be made the reply says so as it is dropped.
        let _ = thread::Builder::new()
            .name("display-call".into())
            .spawn(move || {
                work(&display, reply);
                drop(slot);
            });
    }

    /// All outputs.
    pub fn outputs(&self) -> Outputs {
        outputs(&self.handle)
    }

    /// Plugs an output in, resizes it or pulls it.
    pub fn set_output(&self, wanted: &SetOutput) -> Result<Outputs, ApiError> {
        let mode = wanted.mode.as_deref().map(str::parse::<OutputMode>);
        let mode = mode.transpose().map_err(|error| {
            ApiError::new(ErrorKind::InvalidParams, error.to_string()).at("mode")
        })?;
        let mode = mode.map(|OutputMode { width, height }| Mode { width, height });
        self.handle
            .set_output(wanted.output as usize, mode)
            .map_err(|error| api_error(&error))?;
        Ok(self.outputs())
    }

    /// Takes a picture. Without a path the file comes as a descriptor.
    pub fn screenshot(
        &self,
        wanted: &Screenshot,
    ) -> Result<(ScreenshotTaken, Option<OwnedFd>), ApiError> {
        let pixels = self
            .handle
            .read_scanout(wanted.output as usize)
            .map_err(|error| api_error(&error))?;
        let failed = |error: io::Error| {
            let what = match &wanted.file {
                Some(path) => format!("cannot write {}: {error}", path.display()),
                None => format!("cannot make a file: {error}"),
            };
            ApiError::new(ErrorKind::HostFailure, what).at("file")
        };
        let mut file = match &wanted.file {
            Some(path) => {
                let mut how = OpenOptions::new();
                let how = how.write(true).create(true).truncate(true);
                open_at_once(how, path).map_err(failed)?
            }
            None => memfd_create("fanlight-screenshot", MemfdFlags::CLOEXEC)
                .map_err(|error| failed(error.into()))?
                .into(),
        };
        write_file(&pixels, &file).map_err(failed)?;
        let bytes = file.stream_position().map_err(failed)?;
        file.rewind().map_err(failed)?;
        let fd = wanted.file.is_none().then(|| OwnedFd::from(file));
        let taken = ScreenshotTaken {
            width: pixels.width,
            height: pixels.height,
            bytes,
            fd: fd.as_ref().map(|_| 0),
        };
        Ok((taken, fd))
    }

    /// A dma-buf of what an output shows.
    pub fn export_scanout(
        &self,
        output: u32,
    ) -> Result<(display::ExportedFrame, OwnedFd), ApiError> {
        let image = self.handle.export_scanout(output as usize);
        let image = image.map_err(|error| api_error(&error))?;
        Ok((described(&image), image.fd))
    }

    /// A dma-buf of a resource.
    pub fn export_resource(&self, id: u32) -> Result<(ExportedResource, OwnedFd), ApiError> {
        let exported = self.handle.export_resource(id);
        let exported = exported.map_err(|error| api_error(&error))?;
        let memory = ExportedResource {
            fd: 0,
            size: exported.size,
            location: location(exported.location),
        };
        Ok((memory, exported.fd))
    }

    /// Starts a stream; the socket's other end is the caller's.
    pub fn subscribe(
        &self,
        wanted: &SubscribeDisplay,
    ) -> Result<(DisplayStream, OwnedFd), ApiError> {
        let slot = Slot::take(&self.streams, MAX_STREAMS).ok_or_else(|| {
            ApiError::new(
                ErrorKind::Busy,
                format!("{MAX_STREAMS} display streams are open: close one"),
            )
        })?;
        let driver = wanted.drive.then(|| Driver::take(&self.driven)).flatten();
        let drives = driver.is_some();
        let failed = |error: io::Error| {
            let what = format!("cannot start a display stream: {error}");
            ApiError::new(ErrorKind::HostFailure, what)
        };
        let inputs = driver.map(|driver| (driver, self.inputs.clone()));
        let subscription = self.handle.subscribe(wanted.pace).map_err(failed)?;
        let fd = super::stream::start(self.handle.clone(), subscription, inputs, slot)
            .map_err(failed)?;
        Ok((DisplayStream { fd: 0, drives }, fd))
    }
}

/// One of a limited number of things at once.
pub(super) struct Slot(Arc<AtomicUsize>);

impl Slot {
    fn take(count: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        let more = |open| (open < most).then_some(open + 1);
        count
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more)
            .ok()?;
        Some(Self(count.clone()))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The one that drives.
pub(super) struct Driver(Arc<AtomicBool>);

impl Driver {
    fn take(driven: &Arc<AtomicBool>) -> Option<Self> {
        let before = driven.swap(true, Ordering::AcqRel);
        (!before).then(|| Self(driven.clone()))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

fn write_file(pixels: &Pixels, file: &File) -> io::Result<()> {
    let mut writer = BufWriter::new(file);
    write_png(pixels, &mut writer).map_err(io::Error::other)?;
    io::Write::flush(&mut writer)
}

pub(super) fn outputs(handle: &DisplayHandle) -> Outputs {
    let outputs = handle.outputs().into_iter().map(|info| OutputState {
        output: info.index as u32,
        connected: info.output.connected,
        width: info.output.mode.width,
        height: info.output.mode.height,
        shown: info.shown.map(|area| [area.width, area.height]),
    });
    Outputs {
        outputs: outputs.collect(),
    }
}

fn location(location: Location) -> PixelLocation {
    match location {
        Location::GuestRam => PixelLocation::GuestRam,
        Location::Device => PixelLocation::Device,
        Location::Host => PixelLocation::Host,
    }
}

pub(super) fn described(frame: &ExportedFrame) -> display::ExportedFrame {
    display::ExportedFrame {
        fd: 0,
        memory: match frame.memory {
            FrameMemory::DmaBuf => display::FrameMemory::DmaBuf,
            FrameMemory::Shared => display::FrameMemory::Shared,
        },
        width: frame.width,
        height: frame.height,
        stride: frame.stride,
        offset: frame.offset,
        fourcc: frame.fourcc,
        modifier: frame.modifier,
        location: location(frame.location),
    }
}

fn api_error(error: &DisplayError) -> ApiError {
    let (kind, field) = match error {
        DisplayError::NoOutput(_) => (ErrorKind::NotFound, "output"),
        DisplayError::BadMode(_) => (ErrorKind::InvalidParams, "mode"),
        DisplayError::Dark(_) | DisplayError::Gone(_) => (ErrorKind::WrongState, "output"),
        DisplayError::NoResource(_) => (ErrorKind::NotFound, "resource"),
        DisplayError::Frame(FrameError::Export(_)) => (ErrorKind::BadInput, "output"),
        DisplayError::Frame(_) => (ErrorKind::HostFailure, "output"),
    };
    ApiError::new(kind, error_line(error)).at(field)
}
