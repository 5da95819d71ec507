//! Outputs and frames as messages of the API.

use fanlight_api::display::{self, OutputState, Outputs, PixelLocation};
use fanlight_devices::virtio::gpu::{DisplayHandle, ExportedFrame, FrameMemory, Location};

/// All outputs of a display.
pub fn outputs(display: &DisplayHandle) -> Outputs {
    let outputs = display.outputs().into_iter().map(|info| OutputState {
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

/// A frame whose descriptor is the first one of its message.
pub fn frame(frame: &ExportedFrame) -> display::ExportedFrame {
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

/// The memory that pixels are in.
pub fn location(location: Location) -> PixelLocation {
    match location {
        Location::GuestRam => PixelLocation::GuestRam,
        Location::Device => PixelLocation::Device,
        Location::Host => PixelLocation::Host,
    }
}
