//! The first output of the virtio GPU, and the framebuffers that it shows.

use std::os::fd::AsFd;

use super::{
    Device, ModeInfo, address,
    calls::{
        AddFb2, CreateDumb, Cursor2, DirtyFb, GetConnector, GetResources, MapDumb, RemoveFb,
        SetCrtc,
    },
};
use crate::{Context, Failure, Result, common::pci::Mmio};

const XRGB8888: u32 = u32::from_le_bytes(*b"XR24");
const CONNECTED: u32 = 1;
/// `DRM_MODE_CURSOR_BO`: the call sets the image.
const CURSOR_BO: u32 = 1;

/// The virtio GPU with its first connected output.
#[derive(Debug)]
pub struct Card {
    device: Device,
    crtc: u32,
    connector: u32,
}

/// A buffer of the card with its framebuffer, on screen or not.
#[derive(Debug)]
pub struct Shown {
    pub(crate) handle: u32,
    fb: u32,
}

impl Card {
    /// Finds the GPU and its output.
    pub fn open() -> Result<Self> {
        Self::of(Device::open()?)
    }

    /// Finds the output of a GPU.
    pub fn of(device: Device) -> Result<Self> {
        let mut crtcs = [0u32; 16];
        let mut connectors = [0u32; 16];
        let mut resources = GetResources {
            crtcs: address(&mut crtcs),
            connectors: address(&mut connectors),
            count_crtcs: 16,
            count_connectors: 16,
            ..Default::default()
        };
        // SAFETY: each array has room for its count.
        unsafe { device.call(&mut resources) }?;
        let count = resources.count_connectors.min(16) as usize;
        let mut card = Self {
            device,
            crtc: crtcs[0],
            connector: 0,
        };
        for &connector in &connectors[..count] {
            if card.modes_of(connector)?.0 == CONNECTED {
                card.connector = connector;
                return Ok(card);
            }
        }
        Err(Failure("no connector is connected".into()))
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether a connector is connected, and its modes.
    fn modes_of(&self, connector_id: u32) -> Result<(u32, Vec<ModeInfo>)> {
        let mut modes = [ModeInfo::default(); 64];
        // The first call probes. A call that asks for modes without room for any would not report them.
        let mut connector = GetConnector {
            connector_id,
            ..Default::default()
        };
        // SAFETY: no array is given.
        unsafe { self.device.call(&mut connector) }?;
        let (connection, count) = (connector.connection, connector.count_modes.min(64));
        connector = GetConnector {
            connector_id,
            modes: address(&mut modes),
            count_modes: count,
            ..Default::default()
        };
        // SAFETY: the array has room for the count of modes.
        unsafe { self.device.call(&mut connector) }?;
        Ok((connection, modes[..count as usize].to_vec()))
    }

    /// The output's modes, the preferred one first.
    pub(crate) fn modes(&self) -> Result<Vec<ModeInfo>> {
        Ok(self.modes_of(self.connector)?.1)
    }

    /// Imports a dma-buf of XRGB8888 pixels, lines without gaps, as a framebuffer.
    pub fn import(&self, dmabuf: &impl AsFd, width: u32, height: u32) -> Result<Shown> {
        self.framebuffer(self.device.import(dmabuf)?, width, height)
    }

    /// Creates memory for a picture, and a framebuffer of it. The driver makes a blob of the memory.
    pub fn create(&self, width: u32, height: u32) -> Result<Shown> {
        let mut dumb = CreateDumb {
            width,
            height,
            bpp: 32,
            ..Default::default()
        };
        // SAFETY: the structure is the whole of the argument.
        unsafe { self.device.call(&mut dumb) }?;
        self.framebuffer(dumb.handle, width, height)
    }

    /// Creates a framebuffer of a buffer of XRGB8888 pixels, lines without gaps.
    pub(crate) fn framebuffer(&self, handle: u32, width: u32, height: u32) -> Result<Shown> {
        let mut fb = AddFb2 {
            width,
            height,
            pixel_format: XRGB8888,
            handles: [handle, 0, 0, 0],
            pitches: [width * 4, 0, 0, 0],
            ..Default::default()
        };
        // SAFETY: the structure is the whole of the argument.
        unsafe { self.device.call(&mut fb) }?;
        let fb = fb.fb_id;
        Ok(Shown { handle, fb })
    }

    /// Maps the memory of a picture that [`Self::create`] made.
    pub fn map(&self, shown: &Shown, width: u32, height: u32) -> Result<Mmio> {
        let mut map = MapDumb {
            handle: shown.handle,
            ..Default::default()
        };
        // SAFETY: the structure is the whole of the argument.
        unsafe { self.device.call(&mut map) }?;
        let len = u64::from(width) * u64::from(height) * 4;
        Mmio::new(self.device.file(), map.offset, len).context("cannot map a picture")
    }

    /// Shows a framebuffer of this size.
    pub fn show(&self, shown: &Shown, width: u32, height: u32) -> Result<()> {
        let modes = self.modes()?;
        let mode = modes.iter().find(|mode| mode.size() == (width, height));
        let mode = *mode.ok_or_else(|| Failure(format!("no mode has {width}x{height} pixels")))?;
        self.set(shown, mode)
    }

    /// The same in a custom mode whose frames last `microseconds`: Linux's driver delays every update to the next
    /// frame.
    pub fn show_fast(
        &self,
        shown: &Shown,
        width: u16,
        height: u16,
        microseconds: u32,
    ) -> Result<()> {
        // A mode needs sync pulses and blank lines, at least one of each.
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

    /// Shows a framebuffer in a mode.
    pub(crate) fn set(&self, shown: &Shown, mode: ModeInfo) -> Result<()> {
        let mut connectors = [self.connector];
        let mut crtc = SetCrtc {
            connectors: address(&mut connectors),
            count_connectors: 1,
            crtc_id: self.crtc,
            fb_id: shown.fb,
            mode_valid: 1,
            mode,
            ..Default::default()
        };
        // SAFETY: the array has one connector, as the count says.
        unsafe { self.device.call(&mut crtc) }
    }

    /// Sets the cursor to a square picture with sides of `side` pixels. `hot` is the pixel that points, from the left
    /// and from the top. The driver keeps the picture's memory.
    pub fn set_cursor(&self, shown: &Shown, side: u32, hot: [i32; 2]) -> Result<()> {
        let mut cursor = Cursor2 {
            flags: CURSOR_BO,
            crtc_id: self.crtc,
            width: side,
            height: side,
            handle: shown.handle,
            hot,
            ..Default::default()
        };
        // SAFETY: the structure is the whole of the argument.
        unsafe { self.device.call(&mut cursor) }
    }

    /// Reports that a framebuffer's pixels changed.
    pub fn dirty(&self, shown: &Shown) -> Result<()> {
        let mut dirty = DirtyFb {
            fb_id: shown.fb,
            ..Default::default()
        };
        // SAFETY: no rectangles are given.
        unsafe { self.device.call(&mut dirty) }
    }

    /// Removes a framebuffer from the screen and frees its buffer.
    pub fn forget(&self, shown: Shown) -> Result<()> {
        // SAFETY: the structure is the whole of the argument.
        unsafe { self.device.call(&mut RemoveFb { fb_id: shown.fb }) }?;
        self.device.close(shown.handle)
    }
}
