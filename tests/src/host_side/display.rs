//! Guest displays, as a client of the API sees them.

use std::{
    fs::File,
    io::BufReader,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    thread,
    time::{Duration, Instant},
};

use fanlight_api::{
    client::{Client, ClientError},
    display::{
        DisplayUpdate, ExportedFrame, OutputIndex, Screenshot, SetOutput, SubscribeDisplay,
        ViewerMessage,
    },
    methods::{DisplaySubscribe, GpuExportScanout, GpuScreenshot, GpuSetOutput, VmStats},
    stream::MessageStream,
    types::NoParams,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

use crate::{Context, Failure, Result, ensure, host_side::guest::PATIENCE};

/// Red, green and blue.
pub type Colour = [u8; 3];

/// Bytes of pixels that Fanlight has copied for the first GPU.
pub fn copied(client: &mut Client) -> Result<u64> {
    let stats = client.call::<VmStats>(&NoParams {}).context("vm.stats")?;
    let gpu = stats.gpus.first().ok_or(Failure("no GPU".into()))?;
    Ok(gpu.copied)
}

/// The display of a machine's GPU.
pub struct Screen {
    client: Client,
    gpu: u32,
}

impl Screen {
    /// Connects to the machine's API, for its first GPU.
    pub fn connect(socket: &Path) -> Result<Self> {
        Self::of_gpu(socket, 0)
    }

    /// Connects to the machine's API, for this GPU.
    pub fn of_gpu(socket: &Path, gpu: u32) -> Result<Self> {
        let client = Client::connect(socket).context("cannot connect to the API")?;
        Ok(Self { client, gpu })
    }

    /// The machine's API.
    pub fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    /// The picture of an output, or `None` while it is dark.
    pub fn picture(&mut self, output: u32) -> Result<Option<Picture>> {
        let wanted = Screenshot {
            gpu: self.gpu,
            output,
            file: None,
        };
        match self.client.call_with::<GpuScreenshot>(&wanted, &[]) {
            Ok((_, fds)) => Picture::read(File::from(one(fds)?)).map(Some),
            Err(ClientError::Refused(_)) => Ok(None),
            Err(error) => Err(error).context("gpu.screenshot"),
        }
    }

    /// Waits until an output shows a picture of this size with these colours.
    pub fn wait_for(
        &mut self,
        output: u32,
        (width, height): (u32, u32),
        colour: impl Fn(u32, u32) -> Colour,
    ) -> Result<()> {
        let start = Instant::now();
        loop {
            let picture = self.picture(output)?;
            let wrong = match &picture {
                None => "nothing is shown".to_owned(),
                Some(Picture { size, .. }) if *size != (width, height) => format!("{size:?}"),
                Some(picture) => match picture.differs(&colour) {
                    None => return Ok(()),
                    Some(text) => text,
                },
            };
            ensure(
                start.elapsed() < PATIENCE,
                format!("output {output} is not {width}x{height} as it must be: {wrong}"),
            )?;
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until an output is lit or dark.
    pub fn wait_lit(&mut self, output: u32, lit: bool) -> Result<()> {
        let start = Instant::now();
        while self.picture(output)?.is_some() != lit {
            ensure(
                start.elapsed() < PATIENCE,
                format!(
                    "output {output} does not become {}",
                    if lit { "lit" } else { "dark" }
                ),
            )?;
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Resizes or disconnects an output.
    pub fn set_output(&mut self, output: u32, mode: Option<&str>) -> Result<()> {
        let set = SetOutput {
            gpu: self.gpu,
            output,
            mode: mode.map(str::to_owned),
        };
        self.client
            .call::<GpuSetOutput>(&set)
            .map(drop)
            .context("gpu.set_output")
    }

    /// Exports the picture of an output as a dma-buf.
    pub fn export(&mut self, output: u32) -> Result<Shown> {
        let gpu = self.gpu;
        let (picture, fds) = self
            .client
            .call_with::<GpuExportScanout>(&OutputIndex { gpu, output }, &[])
            .context("gpu.export_scanout")?;
        Shown::map(picture, fds)
    }

    /// Subscribes to display updates. Each damage is released at once.
    pub fn watch(&mut self, pace: bool) -> Result<News> {
        self.subscribe(pace, false)
    }

    /// The same for a viewer that drives the guest's keyboard and pointer.
    pub fn drive(&mut self) -> Result<News> {
        self.subscribe(false, true)
    }

    fn subscribe(&mut self, pace: bool, drive: bool) -> Result<News> {
        let gpu = self.gpu;
        let watch = SubscribeDisplay { gpu, pace, drive };
        let (_, fds) = self
            .client
            .call_with::<DisplaySubscribe>(&watch, &[])
            .context("display.subscribe")?;
        let stream = MessageStream::new(UnixStream::from(one(fds)?)).context("a stream")?;
        Ok(News(stream))
    }
}

fn one(fds: Vec<OwnedFd>) -> Result<OwnedFd> {
    fds.into_iter()
        .next()
        .ok_or(Failure("the reply has no descriptor".into()))
}

/// A picture of an output.
#[derive(Debug)]
pub struct Picture {
    size: (u32, u32),
    pixels: Vec<Colour>,
}

impl Picture {
    fn read(file: File) -> Result<Self> {
        let mut reader = png::Decoder::new(BufReader::new(file))
            .read_info()
            .context("not a PNG file")?;
        let len = reader.output_buffer_size();
        let mut bytes = vec![0; len.ok_or(Failure("the picture is too large".into()))?];
        let info = reader
            .next_frame(&mut bytes)
            .context("the PNG file is damaged")?;
        let pixels = bytes.chunks_exact(info.color_type.samples());
        Ok(Self {
            size: (info.width, info.height),
            pixels: pixels.map(|p| [p[0], p[1], p[2]]).collect(),
        })
    }

    /// Width and height.
    pub fn size(&self) -> (u32, u32) {
        self.size
    }

    /// Number of pixels with this colour.
    pub fn count(&self, colour: Colour) -> usize {
        self.pixels.iter().filter(|&&pixel| pixel == colour).count()
    }

    /// Describes the first pixel that differs.
    pub fn differs(&self, colour: impl Fn(u32, u32) -> Colour) -> Option<String> {
        let places = (0..self.size.1).flat_map(|y| (0..self.size.0).map(move |x| (x, y)));
        places
            .zip(&self.pixels)
            .map(|((x, y), &shown)| (x, y, shown, colour(x, y)))
            .find(|(_, _, shown, wanted)| shown != wanted)
            .map(|(x, y, shown, wanted)| format!("pixel {x},{y} is {shown:?}, not {wanted:?}"))
    }
}

/// An exported frame, mapped.
pub struct Shown {
    /// The frame's description.
    pub picture: ExportedFrame,
    fd: OwnedFd,
    start: *mut u8,
    len: usize,
}

impl Shown {
    fn map(picture: ExportedFrame, fds: Vec<OwnedFd>) -> Result<Self> {
        let fd = one(fds)?;
        let len = picture.offset as usize + picture.stride as usize * picture.height as usize;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe {
            let (access, flags) = (ProtFlags::READ, MapFlags::SHARED);
            mmap(std::ptr::null_mut(), len, access, flags, &fd, 0)
        };
        Ok(Self {
            picture,
            fd,
            start: start.context("cannot map a picture")?.cast(),
            len,
        })
    }

    /// The dma-buf.
    pub fn fd(&self) -> impl AsFd {
        &self.fd
    }

    /// The current bytes of a pixel.
    pub fn pixel(&self, x: u32, y: u32) -> [u8; 4] {
        let at = self.picture.offset as usize + (y * self.picture.stride + x * 4) as usize;
        assert!(at + 4 <= self.len);
        // SAFETY: within the mapping, as checked; the access is volatile since others may write.
        unsafe { self.start.add(at).cast::<[u8; 4]>().read_volatile() }
    }

    /// Whether all pixels are equal to `wanted`.
    pub fn is(&self, wanted: impl Fn(u32, u32) -> [u8; 4]) -> bool {
        let (width, height) = (self.picture.width, self.picture.height);
        (0..height).all(|y| (0..width).all(|x| self.pixel(x, y) == wanted(x, y)))
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}

/// A stream of display updates.
pub struct News(MessageStream);

impl News {
    /// The first update that `wanted` accepts.
    pub fn find<T>(
        &mut self,
        mut wanted: impl FnMut(DisplayUpdate, Vec<OwnedFd>) -> Option<T>,
    ) -> Result<T> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            let second = Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&second))
                .context("cannot wait")?;
            let mut found = None;
            for (news, fds) in self.0.receive().context("the stream")? {
                if let DisplayUpdate::Damage { serial, .. } = news {
                    let release = ViewerMessage::Release { serial };
                    self.0.send(&release, vec![]).context("cannot release")?;
                }
                if found.is_none() {
                    found = wanted(news, fds);
                }
            }
            if let Some(found) = found {
                return Ok(found);
            }
        }
        Err(Failure("the expected display update never came".into()))
    }

    /// Sends a message to the display.
    pub fn say(&mut self, says: &ViewerMessage) -> Result<()> {
        self.0
            .send(says, vec![])
            .context("cannot send a message to the display")
    }

    /// The next frame of an output.
    pub fn picture(&mut self, wanted: u32) -> Result<Shown> {
        self.find(|news, fds| match news {
            DisplayUpdate::Scanout {
                output,
                frame: Some(picture),
                ..
            } if output == wanted => Some(Shown::map(picture, fds)),
            _ => None,
        })?
    }

    /// Waits until an output shows nothing.
    pub fn dark(&mut self, wanted: u32) -> Result<()> {
        self.find(|news, _| match news {
            DisplayUpdate::Scanout {
                output,
                frame: None,
                ..
            } => (output == wanted).then_some(()),
            _ => None,
        })
    }
}
