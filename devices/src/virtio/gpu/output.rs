//! Outputs: which are connected, their size, and where they are placed.

use super::protocol::VIRTIO_GPU_MAX_SCANOUTS;

/// How many outputs the device has, plugged in or not.
pub const OUTPUTS: usize = VIRTIO_GPU_MAX_SCANOUTS;

/// Size of an output in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

impl Mode {
    /// The smallest width and height: Linux's driver knows none below.
    pub const MIN: u32 = 32;
    /// The largest width and height: above what any driver draws, and every size in bytes fits 32 bits.
    pub const MAX: u32 = 16384;
    /// Mode of an output that was never configured.
    pub const DEFAULT: Self = Self {
        width: 1280,
        height: 800,
    };

    /// Whether an output can have it.
    pub fn is_valid(self) -> bool {
        let valid = Self::MIN..=Self::MAX;
        valid.contains(&self.width) && valid.contains(&self.height)
    }

    /// Width and height of a screen with 96 pixels an inch.
    pub fn millimetres(self) -> (u32, u32) {
        let mm = |pixels| pixels * 254 / 960;
        (mm(self.width), mm(self.height))
    }
}

/// An output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its size; while it is unplugged, what it had before.
    pub mode: Mode,
    /// Whether it is plugged in.
    pub connected: bool,
}

impl Output {
    /// Nothing is plugged in.
    pub const UNPLUGGED: Self = Self {
        mode: Mode::DEFAULT,
        connected: false,
    };
}

/// All outputs, with the first ones plugged in.
pub fn outputs(modes: &[Mode]) -> [Output; OUTPUTS] {
    let mut outputs = [Output::UNPLUGGED; OUTPUTS];
    for (output, &mode) in outputs.iter_mut().zip(modes) {
        *output = Output {
            mode,
            connected: true,
        };
    }
    outputs
}

/// Where each output begins, side by side from left to right.
pub fn positions(outputs: &[Output; OUTPUTS]) -> [u32; OUTPUTS] {
    let mut x = 0;
    outputs.map(|output| {
        let at = x;
        if output.connected {
            x += output.mode.width;
        }
        at
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_stand_side_by_side() {
        let mode = |width| Mode { width, height: 100 };
        let mut outputs = outputs(&[mode(640), mode(800), mode(1024)]);
        outputs[1].connected = false;
        let at = positions(&outputs);
        assert_eq!(at[..4], [0, 640, 640, 1664]);
    }
}
