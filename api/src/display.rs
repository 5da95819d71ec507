//! The display: what methods take and give, and the messages of a display stream.
//!
//! `display.subscribe` gives a socket of its own, so that pictures hold up no other call. Both ends send
//! JSON objects on it, one a line; descriptors travel with the line that names them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Names a GPU.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct GpuIndex {
    /// Its number, from 0 on.
    pub gpu: u32,
}

/// Names an output.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct OutputIndex {
    /// The GPU's number, from 0 on.
    pub gpu: u32,
    /// Its number, from 0 on.
    pub output: u32,
}

/// Names a resource of the guest's.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ResourceId {
    /// The GPU's number, from 0 on.
    #[serde(default)]
    pub gpu: u32,
    /// Its number, as the guest's driver chose it.
    pub resource: u32,
}

/// What an output is to be.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SetOutput {
    /// The GPU's number, from 0 on.
    #[serde(default)]
    pub gpu: u32,
    /// Its number, from 0 on.
    pub output: u32,
    /// Its size in pixels: `1920x1080`; nothing pulls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
}

/// An output.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct OutputState {
    /// Its number.
    pub output: u32,
    /// Whether it is plugged in.
    pub connected: bool,
    /// The width that its EDID prefers, in pixels.
    pub width: u32,
    /// The height.
    pub height: u32,
    /// The size of what the guest shows on it; nothing while it shows nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shown: Option<[u32; 2]>,
}

/// All outputs.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct Outputs {
    /// By number.
    pub outputs: Vec<OutputState>,
}

/// A picture to be taken of an output.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Screenshot {
    /// The GPU's number, from 0 on.
    pub gpu: u32,
    /// The output's number.
    pub output: u32,
    /// Where to write a PNG file; the reply carries a descriptor of one if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<std::path::PathBuf>,
}

/// A PNG file.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct ScreenshotTaken {
    /// Pixels in a line.
    pub width: u32,
    /// Lines.
    pub height: u32,
    /// The file's length in bytes.
    pub bytes: u64,
    /// Its place among the message's descriptors, if no path was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<u32>,
}

/// Where pixels are.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PixelsIn {
    /// The guest's RAM.
    GuestRam,
    /// Memory of a passed-through device.
    Device,
    /// Memory of Fanlight's, into which the guest's was copied, or of its renderer's, in which it draws.
    Host,
}

/// What a picture's descriptor is.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PictureMemory {
    /// A dma-buf with the pixels themselves.
    #[default]
    DmaBuf,
    /// A memory file with a copy of them, for reading, which is brought up to date before each `damage`. Only
    /// streams have such, where no dma-buf can be made, or the watcher wants none of a device's memory.
    Shared,
}

/// A picture that can be mapped or imported.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct ExportedPicture {
    /// The descriptor's place among the message's.
    pub fd: u32,
    /// What the descriptor is.
    #[serde(default)]
    pub memory: PictureMemory,
    /// Pixels in a line.
    pub width: u32,
    /// Lines.
    pub height: u32,
    /// Bytes from a line to the next.
    pub stride: u32,
    /// Bytes in front of the first line.
    pub offset: u64,
    /// DRM's code of the format (`drm_fourcc.h`).
    pub fourcc: u32,
    /// DRM's code of the layout; 0 is linear.
    pub modifier: u64,
    /// Where the pixels are.
    pub location: PixelsIn,
}

/// A resource in a dma-buf.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct ExportedMemory {
    /// The dma-buf's place among the message's descriptors.
    pub fd: u32,
    /// Bytes.
    pub size: u64,
    /// Where they are.
    pub location: PixelsIn,
}

/// How to watch.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct WatchDisplay {
    /// The GPU's number, from 0 on.
    pub gpu: u32,
    /// Whether the guest's next frame waits, for a short time at most, until this one is released.
    pub pace: bool,
    /// Whether keys, pointer and sizes come from here. One stream of a GPU may at a time.
    pub drive: bool,
}

/// A display stream.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct DisplayStream {
    /// The stream socket's place among the message's descriptors.
    pub fd: u32,
    /// Whether this stream drives.
    pub drives: bool,
}

/// A rectangle: x, y, width and height in pixels.
pub type Rectangle = [u32; 4];

/// A cursor's look.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct CursorLook {
    /// A memory file's place among the message's descriptors: ARGB8888, lines without gaps.
    pub fd: u32,
    /// Pixels in a line.
    pub width: u32,
    /// Lines.
    pub height: u32,
    /// The point that points, from the left.
    pub hot_x: u32,
    /// The same from the top.
    pub hot_y: u32,
}

/// What the display says on a stream.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum DisplayNews {
    /// Outputs were plugged in, pulled or resized.
    Outputs(Outputs),
    /// An output shows another picture, or the same one in other memory, or none.
    Scanout {
        /// The output.
        output: u32,
        /// What it shows.
        picture: Option<ExportedPicture>,
        /// Why the guest shows a picture and yet there is none here: none can be made, or it lies in memory of a
        /// passed-through device that is off for the moment.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// The guest drew.
    Damage {
        /// The output.
        output: u32,
        /// Where.
        areas: Vec<Rectangle>,
        /// To be released.
        serial: u64,
    },
    /// A cursor looks different, or is hidden.
    CursorImage {
        /// The output.
        output: u32,
        /// How it looks.
        look: Option<CursorLook>,
    },
    /// A cursor is elsewhere.
    CursorPosition {
        /// The output.
        output: u32,
        /// From the left.
        x: i32,
        /// From the top.
        y: i32,
    },
}

/// What a watcher says on a stream. All but `release` and `copy_device_memory` are for the one that drives.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum WatcherSays {
    /// Everything up to this damage has been shown, or never will be.
    Release {
        /// Of a `damage`.
        serial: u64,
    },
    /// Pictures in memory of a passed-through device, whose dma-bufs can be imported and not mapped, are to come as
    /// copies from now on.
    CopyDeviceMemory,
    /// The output is to have another size.
    Resize {
        /// The output.
        output: u32,
        /// Width in pixels.
        width: u32,
        /// Height.
        height: u32,
    },
    /// A key.
    Key {
        /// `KEY_*` of Linux `input-event-codes.h`.
        code: u16,
        /// Down or up.
        pressed: bool,
    },
    /// The pointer, as parts of the output's size from 0 to 1.
    Pointer {
        /// The output.
        output: u32,
        /// From the left.
        x: f64,
        /// From the top.
        y: f64,
    },
    /// All keys and buttons are up.
    Unfocused,
    /// A button of the pointer.
    Button {
        /// `BTN_*`.
        code: u16,
        /// Down or up.
        pressed: bool,
    },
    /// The wheel, in 120ths of a notch.
    Wheel {
        /// To the right.
        horizontal: i32,
        /// Down.
        vertical: i32,
    },
    /// A finger.
    Touch {
        /// The output.
        output: u32,
        /// Which finger.
        finger: i32,
        /// Where, as for the pointer; nothing when it has left.
        at: Option<[f64; 2]>,
    },
}
