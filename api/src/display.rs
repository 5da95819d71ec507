//! The display: parameters and results of its methods, and the messages of a display stream.
//!
//! `display.subscribe` returns a socket of its own, so that frames delay no other call. Both ends send JSON objects
//! on it, one a line; descriptors travel with the line that names them.

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
    /// The output's number, from 0 on.
    pub output: u32,
}

/// Names a guest resource.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ResourceId {
    /// The GPU's number, from 0 on.
    #[serde(default)]
    pub gpu: u32,
    /// Its number, as the guest's driver chose it.
    pub resource: u32,
}

/// The mode to give an output.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SetOutput {
    /// The GPU's number, from 0 on.
    #[serde(default)]
    pub gpu: u32,
    /// The output's number, from 0 on.
    pub output: u32,
    /// Its size in pixels: `1920x1080`. Without one the output is disconnected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
}

/// An output.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct OutputState {
    /// Its number.
    pub output: u32,
    /// Whether a monitor is connected to it.
    pub connected: bool,
    /// The width that its EDID prefers, in pixels.
    pub width: u32,
    /// The height that its EDID prefers, in pixels.
    pub height: u32,
    /// Width and height of the scanout in pixels; absent while the guest shows nothing.
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

/// Which output to write as a PNG file, and where.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Screenshot {
    /// The GPU's number, from 0 on.
    pub gpu: u32,
    /// The output's number.
    pub output: u32,
    /// Path of the PNG file. Without one the reply carries a descriptor of a memory file.
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
    /// Index of the memory file among the message's descriptors, if no path was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<u32>,
}

/// The memory that pixels are in.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PixelLocation {
    /// Guest RAM.
    GuestRam,
    /// A BAR of a passed-through device.
    Device,
    /// Memory of the host: a copy that Fanlight made, or the memory that the renderer draws in.
    Host,
}

/// The kind of a frame's descriptor.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FrameMemory {
    /// A dma-buf with the pixels themselves.
    #[default]
    DmaBuf,
    /// A memory file with a copy of them, to read. Each `damage` follows an update of the copy. Only streams have
    /// copies: where no dma-buf can be made, or after `copy_device_memory`.
    Shared,
}

/// A frame that can be mapped or imported: one scanout of an output.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct ExportedFrame {
    /// Index of the descriptor among the message's descriptors.
    pub fd: u32,
    /// The kind of the descriptor.
    #[serde(default)]
    pub memory: FrameMemory,
    /// Pixels in a line.
    pub width: u32,
    /// Lines.
    pub height: u32,
    /// Bytes from one line to the next.
    pub stride: u32,
    /// Bytes in front of the first line.
    pub offset: u64,
    /// DRM format code (`drm_fourcc.h`).
    pub fourcc: u32,
    /// DRM format modifier; 0 is linear.
    pub modifier: u64,
    /// The memory that the pixels are in.
    pub location: PixelLocation,
}

/// A resource in a dma-buf.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct ExportedResource {
    /// Index of the dma-buf among the message's descriptors.
    pub fd: u32,
    /// Size in bytes.
    pub size: u64,
    /// The memory that the resource is in.
    pub location: PixelLocation,
}

/// Parameters of a display stream.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct SubscribeDisplay {
    /// The GPU's number, from 0 on.
    pub gpu: u32,
    /// Whether the guest's next frame waits, for a short time at most, until the viewer has released this one.
    pub pace: bool,
    /// Whether this stream sends keys, pointer and sizes. One stream of a GPU can at a time.
    pub drive: bool,
}

/// A display stream.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct DisplayStream {
    /// Index of the stream socket among the message's descriptors.
    pub fd: u32,
    /// Whether this stream may send keys, pointer and sizes.
    pub drives: bool,
}

/// A rectangle: x, y, width and height in pixels.
pub type Rectangle = [u32; 4];

/// An image of a cursor.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[schemars(deny_unknown_fields)]
pub struct ExportedCursor {
    /// Index of a memory file among the message's descriptors: ARGB8888, lines without gaps.
    pub fd: u32,
    /// Pixels in a line.
    pub width: u32,
    /// Lines.
    pub height: u32,
    /// The hot spot, in pixels from the left.
    pub hot_x: u32,
    /// The hot spot, in pixels from the top.
    pub hot_y: u32,
}

/// A message from the display to a viewer.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum DisplayUpdate {
    /// Outputs were connected, disconnected or resized.
    Outputs(Outputs),
    /// An output has another frame, the same frame in other memory, or none.
    Scanout {
        /// The output.
        output: u32,
        /// Its frame; absent while it shows none, or with `error`.
        frame: Option<ExportedFrame>,
        /// Why the guest's frame is absent: it cannot be exported, or it is in memory of a passed-through device that
        /// is off.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// The guest has drawn into its frame.
    Damage {
        /// The output.
        output: u32,
        /// The rectangles that changed.
        areas: Vec<Rectangle>,
        /// The number to release once this frame has been shown.
        serial: u64,
    },
    /// A cursor has another image, or is hidden.
    CursorImage {
        /// The output.
        output: u32,
        /// The image; absent when hidden.
        image: Option<ExportedCursor>,
    },
    /// A cursor moved.
    CursorPosition {
        /// The output.
        output: u32,
        /// Pixels from the left.
        x: i32,
        /// Pixels from the top.
        y: i32,
    },
}

/// A message from a viewer to the display. A stream that does not drive may send `release` and `copy_device_memory`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ViewerMessage {
    /// The viewer has shown everything up to this damage, or will never show it.
    Release {
        /// The serial of a `damage`.
        serial: u64,
    },
    /// From now on, frames in memory of a passed-through device come as copies: their dma-bufs can be imported but
    /// not mapped.
    CopyDeviceMemory,
    /// Resizes the output.
    Resize {
        /// The output.
        output: u32,
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
    /// A key was pressed or released.
    Key {
        /// `KEY_*` of Linux `input-event-codes.h`.
        code: u16,
        /// Whether it is down now.
        pressed: bool,
    },
    /// The pointer moved.
    Pointer {
        /// The output.
        output: u32,
        /// From the left, as a part of the output's width: 0 to 1.
        x: f64,
        /// From the top, as a part of the output's height: 0 to 1.
        y: f64,
    },
    /// The window lost the focus: all keys and buttons are up.
    Unfocused,
    /// A pointer button was pressed or released.
    Button {
        /// `BTN_*` of Linux `input-event-codes.h`.
        code: u16,
        /// Whether it is down now.
        pressed: bool,
    },
    /// The wheel was turned, in 120ths of a notch.
    Wheel {
        /// Positive to the right.
        horizontal: i32,
        /// Positive downwards.
        vertical: i32,
    },
    /// A finger touched, moved or left.
    Touch {
        /// The output.
        output: u32,
        /// The finger's number, as the viewer chose it.
        finger: i32,
        /// Its position, as for the pointer; absent when it has left.
        at: Option<[f64; 2]>,
    },
}
