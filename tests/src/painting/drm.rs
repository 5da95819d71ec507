//! The few calls of Linux's display interface that draw and show something (`include/uapi/drm/drm.h`,
//! `drm_mode.h`), on a card of the stock virtio-gpu driver.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd},
};

use crate::{Context, Failure, Result, pci::Mmio};

const VERSION: u64 = 0xc040_6400;
const GEM_CLOSE: u64 = 0x4008_6409;
const PRIME_FD_TO_HANDLE: u64 = 0xc00c_642e;
const GETRESOURCES: u64 = 0xc040_64a0;
const SETCRTC: u64 = 0xc068_64a2;
const GETCONNECTOR: u64 = 0xc050_64a7;
const RMFB: u64 = 0xc004_64af;
const DIRTYFB: u64 = 0xc018_64b1;
const CREATE_DUMB: u64 = 0xc020_64b2;
const MAP_DUMB: u64 = 0xc010_64b3;
const ADDFB2: u64 = 0xc068_64b8;
const XRGB8888: u32 = u32::from_le_bytes(*b"XR24");
const CONNECTED: u32 = 1;
/// Cards that are looked at.
const CARDS: u32 = 8;

#[derive(Default)]
#[repr(C)]
struct Version {
    numbers: [i32; 3],
    name_len: u64,
    name: u64,
    rest: [u64; 4],
}

#[derive(Default)]
#[repr(C)]
struct Prime {
    handle: u32,
    flags: u32,
    fd: i32,
}

#[derive(Default)]
#[repr(C)]
struct Resources {
    fbs: u64,
    crtcs: u64,
    connectors: u64,
    encoders: u64,
    count_fbs: u32,
    count_crtcs: u32,
    count_connectors: u32,
    count_encoders: u32,
    limits: [u32; 4],
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct ModeInfo {
    clock: u32,
    horizontal: [u16; 5],
    vertical: [u16; 5],
    rest: [u32; 3],
    name: [u8; 32],
}

#[derive(Default)]
#[repr(C)]
struct Connector {
    encoders: u64,
    modes: u64,
    props: u64,
    prop_values: u64,
    count_modes: u32,
    count_props: u32,
    count_encoders: u32,
    encoder_id: u32,
    connector_id: u32,
    type_: [u32; 2],
    connection: u32,
    rest: [u32; 4],
}

#[derive(Default)]
#[repr(C)]
struct Crtc {
    connectors: u64,
    count_connectors: u32,
    crtc_id: u32,
    fb_id: u32,
    place: [u32; 2],
    gamma_size: u32,
    mode_valid: u32,
    mode: ModeInfo,
}

#[derive(Default)]
#[repr(C)]
struct Framebuffer {
    fb_id: u32,
    width: u32,
    height: u32,
    pixel_format: u32,
    flags: u32,
    handles: [u32; 4],
    pitches: [u32; 4],
    offsets: [u32; 4],
    modifiers: [u64; 4],
}

#[derive(Default)]
#[repr(C)]
struct Dirty {
    fb_id: u32,
    flags: u32,
    color: u32,
    num_clips: u32,
    clips: u64,
}

#[derive(Default)]
#[repr(C)]
struct CreateDumb {
    height: u32,
    width: u32,
    bpp: u32,
    flags: u32,
    handle: u32,
    pitch: u32,
    size: u64,
}

#[derive(Default)]
#[repr(C)]
struct MapDumb {
    handle: u32,
    pad: u32,
    offset: u64,
}

/// A card of the stock virtio-gpu driver.
#[derive(Debug)]
pub struct Card {
    pub(super) file: File,
    crtc: u32,
    connector: u32,
}

/// A buffer of the card's, shown or not.
#[derive(Debug)]
pub struct Shown {
    pub(super) handle: u32,
    fb: u32,
}

impl Card {
    /// Finds the card by its driver's name: other drivers' cards come before it.
    pub fn open() -> Result<Self> {
        for number in 0..CARDS {
            let path = format!("/dev/dri/card{number}");
            let Ok(file) = File::options().read(true).write(true).open(&path) else {
                continue;
            };
            if driver(&file)? == "virtio_gpu" {
                return Self::with_first_output(file);
            }
        }
        Err(Failure("there is no card of virtio_gpu's".into()))
    }

    fn with_first_output(file: File) -> Result<Self> {
        let mut crtcs = [0u32; 16];
        let mut connectors = [0u32; 16];
        let mut resources = Resources {
            crtcs: address(&mut crtcs),
            connectors: address(&mut connectors),
            count_crtcs: 16,
            count_connectors: 16,
            ..Default::default()
        };
        // SAFETY: the arrays have room for as many as the counts say.
        unsafe { ioctl(&file, GETRESOURCES, &mut resources) }.context("GETRESOURCES")?;
        let count = resources.count_connectors.min(16) as usize;
        let mut card = Self {
            file,
            crtc: crtcs[0],
            connector: 0,
        };
        for &connector in &connectors[..count] {
            if card.modes(connector)?.0 == CONNECTED {
                card.connector = connector;
                return Ok(card);
            }
        }
        Err(Failure("no connector is connected".into()))
    }

    /// Whether a connector is connected, and its modes.
    fn modes(&self, connector_id: u32) -> Result<(u32, Vec<ModeInfo>)> {
        let mut modes = [ModeInfo::default(); 64];
        // The first call probes; asking for modes with room for none would leave them out.
        let mut connector = Connector {
            connector_id,
            ..Default::default()
        };
        // SAFETY: no array is given.
        unsafe { ioctl(&self.file, GETCONNECTOR, &mut connector) }.context("GETCONNECTOR")?;
        let (connection, count) = (connector.connection, connector.count_modes.min(64));
        connector = Connector {
            connector_id,
            modes: address(&mut modes),
            count_modes: count,
            ..Default::default()
        };
        // SAFETY: the array has room for as many modes as the count says.
        unsafe { ioctl(&self.file, GETCONNECTOR, &mut connector) }.context("GETCONNECTOR")?;
        Ok((connection, modes[..count as usize].to_vec()))
    }

    /// Makes a dma-buf of XRGB8888 pixels, lines without gaps, a framebuffer of the card's.
    pub fn import(&self, dmabuf: &impl AsFd, width: u32, height: u32) -> Result<Shown> {
        let mut prime = Prime {
            fd: dmabuf.as_fd().as_raw_fd(),
            ..Default::default()
        };
        // SAFETY: the structure is the whole of the argument.
        unsafe { ioctl(&self.file, PRIME_FD_TO_HANDLE, &mut prime) }
            .context("PRIME_FD_TO_HANDLE")?;
        self.framebuffer(prime.handle, width, height)
    }

    /// Memory for a picture, as a framebuffer. The driver makes a blob of it.
    pub fn create(&self, width: u32, height: u32) -> Result<Shown> {
        let mut dumb = CreateDumb {
            width,
            height,
            bpp: 32,
            ..Default::default()
        };
        // SAFETY: the structure is the whole of the argument.
        unsafe { ioctl(&self.file, CREATE_DUMB, &mut dumb) }.context("CREATE_DUMB")?;
        self.framebuffer(dumb.handle, width, height)
    }

    fn framebuffer(&self, handle: u32, width: u32, height: u32) -> Result<Shown> {
        let mut fb = Framebuffer {
            width,
            height,
            pixel_format: XRGB8888,
            handles: [handle, 0, 0, 0],
            pitches: [width * 4, 0, 0, 0],
            ..Default::default()
        };
        // SAFETY: the structure is the whole of the argument.
        unsafe { ioctl(&self.file, ADDFB2, &mut fb) }.context("ADDFB2")?;
        let fb = fb.fb_id;
        Ok(Shown { handle, fb })
    }

    /// The memory of a picture that [`Self::create`] made.
    pub fn map(&self, shown: &Shown, width: u32, height: u32) -> Result<Mmio> {
        let mut map = MapDumb {
            handle: shown.handle,
            ..Default::default()
        };
        // SAFETY: the structure is the whole of the argument.
        unsafe { ioctl(&self.file, MAP_DUMB, &mut map) }.context("MAP_DUMB")?;
        let len = u64::from(width) * u64::from(height) * 4;
        Mmio::new(&self.file, map.offset, len).context("cannot map a picture")
    }

    /// Shows a framebuffer of this size on the first output.
    pub fn show(&self, shown: &Shown, width: u32, height: u32) -> Result<()> {
        let (_, modes) = self.modes(self.connector)?;
        let fits = |mode: &&ModeInfo| {
            (u32::from(mode.horizontal[0]), u32::from(mode.vertical[0])) == (width, height)
        };
        let mode = modes.iter().find(fits);
        let mode = *mode.ok_or_else(|| Failure(format!("no mode has {width}x{height} pixels")))?;
        self.set(shown, mode)
    }

    /// The same in a mode of our own, whose frames have `microseconds` each: Linux's driver makes every
    /// update wait for the next one.
    pub fn show_fast(
        &self,
        shown: &Shown,
        width: u16,
        height: u16,
        microseconds: u32,
    ) -> Result<()> {
        // Sync pulses and blank lines there must be, however few.
        let (columns, lines) = (width.saturating_add(3), height.saturating_add(3));
        let pixels = u64::from(columns) * u64::from(lines);
        let clock = pixels * 1000 / u64::from(microseconds.max(1));
        let mode = ModeInfo {
            clock: u32::try_from(clock).unwrap_or(u32::MAX >> 1),
            horizontal: [width, width + 1, width + 2, columns, 0],
            vertical: [height, height + 1, height + 2, lines, 0],
            ..Default::default()
        };
        self.set(shown, mode)
    }

    fn set(&self, shown: &Shown, mode: ModeInfo) -> Result<()> {
        let mut connectors = [self.connector];
        let mut crtc = Crtc {
            connectors: address(&mut connectors),
            count_connectors: 1,
            crtc_id: self.crtc,
            fb_id: shown.fb,
            mode_valid: 1,
            mode,
            ..Default::default()
        };
        // SAFETY: the array has one connector, as the count says.
        unsafe { ioctl(&self.file, SETCRTC, &mut crtc) }.context("SETCRTC")
    }

    /// Tells that a framebuffer's pixels changed.
    pub fn dirty(&self, shown: &Shown) -> Result<()> {
        let mut dirty = Dirty {
            fb_id: shown.fb,
            ..Default::default()
        };
        // SAFETY: no rectangles are given.
        unsafe { ioctl(&self.file, DIRTYFB, &mut dirty) }.context("DIRTYFB")
    }

    /// Takes a framebuffer off the screen and lets its memory go.
    pub fn forget(&self, shown: Shown) -> Result<()> {
        let mut fb = shown.fb;
        // SAFETY: the argument is one number.
        unsafe { ioctl(&self.file, RMFB, &mut fb) }.context("RMFB")?;
        self.close(shown.handle)
    }

    pub(super) fn close(&self, handle: u32) -> Result<()> {
        let mut handle = [handle, 0];
        // SAFETY: the argument is two numbers.
        unsafe { ioctl(&self.file, GEM_CLOSE, &mut handle) }.context("GEM_CLOSE")
    }
}

fn driver(card: &File) -> Result<String> {
    let mut name = [0u8; 32];
    let mut version = Version {
        name_len: name.len() as u64,
        name: name.as_mut_ptr().expose_provenance() as u64,
        ..Default::default()
    };
    // SAFETY: the name has room for as much as its length says; the other texts have none.
    unsafe { ioctl(card, VERSION, &mut version) }.context("VERSION")?;
    let len = (version.name_len as usize).min(name.len());
    Ok(String::from_utf8_lossy(&name[..len]).into_owned())
}

/// Where the kernel is to write.
fn address<T>(array: &mut [T]) -> u64 {
    array.as_mut_ptr().expose_provenance() as u64
}

/// # Safety
/// `argument` is what `request` takes, and what it points to is there.
pub(super) unsafe fn ioctl<T>(file: &File, request: u64, argument: &mut T) -> std::io::Result<()> {
    loop {
        // SAFETY: the caller's promise.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), request as _, argument as *mut T) };
        let error = std::io::Error::last_os_error();
        match (result, error.raw_os_error()) {
            (0.., _) => return Ok(()),
            (_, Some(libc::EINTR | libc::EAGAIN)) => {}
            _ => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_as_large_as_the_requests_say() {
        let size = |request: u64| (request >> 16 & 0x3fff) as usize;
        assert_eq!(size_of::<Version>(), size(VERSION));
        assert_eq!(size_of::<Prime>(), size(PRIME_FD_TO_HANDLE));
        assert_eq!(size_of::<Resources>(), size(GETRESOURCES));
        assert_eq!(size_of::<Connector>(), size(GETCONNECTOR));
        assert_eq!(size_of::<Crtc>(), size(SETCRTC));
        assert_eq!(size_of::<Framebuffer>(), size(ADDFB2));
        assert_eq!(size_of::<Dirty>(), size(DIRTYFB));
        assert_eq!(size_of::<CreateDumb>(), size(CREATE_DUMB));
        assert_eq!(size_of::<MapDumb>(), size(MAP_DUMB));
        assert_eq!(size_of::<ModeInfo>(), 68);
    }
}
