//! Pixel formats. The device names them by bytes in memory, DRM by bits of a little-endian word
//! (`include/uapi/drm/drm_fourcc.h`).

use super::protocol::*;

/// `DRM_FORMAT_MOD_LINEAR`: rows one behind the other. The only layout that the device has.
pub const DRM_FORMAT_MOD_LINEAR: u64 = 0;

/// A format of four bytes a pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    id: u32,
    fourcc: [u8; 4],
    /// Where red, green, blue and alpha are in a pixel; `None` where alpha has no meaning.
    red: usize,
    green: usize,
    blue: usize,
    alpha: Option<usize>,
}

const fn format(id: u32, fourcc: &[u8; 4], rgb: [usize; 3], alpha: Option<usize>) -> Format {
    Format {
        id,
        fourcc: *fourcc,
        red: rgb[0],
        green: rgb[1],
        blue: rgb[2],
        alpha,
    }
}

/// Every format of the specification (Virtio 1.4, 5.7.6.8).
pub const FORMATS: [Format; 8] = [
    format(
        VIRTIO_GPU_FORMAT_B8G8R8A8_UNORM,
        b"AR24",
        [2, 1, 0],
        Some(3),
    ),
    format(VIRTIO_GPU_FORMAT_B8G8R8X8_UNORM, b"XR24", [2, 1, 0], None),
    format(
        VIRTIO_GPU_FORMAT_A8R8G8B8_UNORM,
        b"BA24",
        [1, 2, 3],
        Some(0),
    ),
    format(VIRTIO_GPU_FORMAT_X8R8G8B8_UNORM, b"BX24", [1, 2, 3], None),
    format(
        VIRTIO_GPU_FORMAT_R8G8B8A8_UNORM,
        b"AB24",
        [0, 1, 2],
        Some(3),
    ),
    format(VIRTIO_GPU_FORMAT_X8B8G8R8_UNORM, b"RX24", [3, 2, 1], None),
    format(
        VIRTIO_GPU_FORMAT_A8B8G8R8_UNORM,
        b"RA24",
        [3, 2, 1],
        Some(0),
    ),
    format(VIRTIO_GPU_FORMAT_R8G8B8X8_UNORM, b"XB24", [0, 1, 2], None),
];

impl Format {
    /// Bytes of a pixel, in every format.
    pub const BYTES: u32 = 4;
    /// Format of cursors that have none.
    pub const CURSOR: Self = FORMATS[0];

    /// The format that the driver names.
    pub fn from_id(id: u32) -> Option<Self> {
        FORMATS.into_iter().find(|format| format.id == id)
    }

    /// The format of DRM's name.
    pub fn from_fourcc(fourcc: u32) -> Option<Self> {
        FORMATS.into_iter().find(|format| format.fourcc() == fourcc)
    }

    /// The same where alpha has no meaning.
    pub fn opaque(self) -> Self {
        let rgb = |format: &Self| [format.red, format.green, format.blue];
        let mut opaque = FORMATS.into_iter().filter(|format| format.alpha.is_none());
        opaque
            .find(|format| rgb(format) == rgb(&self))
            .unwrap_or(self)
    }

    /// Whether alpha has a meaning.
    pub fn has_alpha(self) -> bool {
        self.alpha.is_some()
    }

    /// The device's number for it.
    pub fn id(self) -> u32 {
        self.id
    }

    /// DRM's name for it.
    pub fn fourcc(self) -> u32 {
        u32::from_le_bytes(self.fourcc)
    }

    /// A pixel as red, green, blue, alpha.
    pub fn to_rgba(self, pixel: [u8; 4]) -> [u8; 4] {
        [
            pixel[self.red],
            pixel[self.green],
            pixel[self.blue],
            self.alpha.map_or(0xff, |at| pixel[at]),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drm_names_the_same_bytes() {
        // DRM writes the components from the word's highest byte down.
        for format in FORMATS {
            let [first, second, ..] = format.fourcc;
            let order: &[u8] = match (first, second) {
                (b'A' | b'X', b'R') => b"bgra",
                (b'B', _) => b"argb",
                (b'A' | b'X', b'B') => b"rgba",
                (b'R', _) => b"abgr",
                other => panic!("{other:?}"),
            };
            let at = |c| order.iter().position(|&o| o == c).unwrap();
            assert_eq!(format.red, at(b'r'));
            assert_eq!(format.green, at(b'g'));
            assert_eq!(format.blue, at(b'b'));
            if let Some(alpha) = format.alpha {
                assert_eq!(alpha, at(b'a'));
            }
            assert_eq!(Format::from_id(format.id), Some(format));
            assert_eq!(Format::from_fourcc(format.fourcc()), Some(format));
            let opaque = format.opaque();
            assert!(!opaque.has_alpha());
            assert_eq!((opaque.red, opaque.blue), (format.red, format.blue));
        }
        assert_eq!(Format::from_id(5), None);
    }

    #[test]
    fn a_pixel_without_alpha_is_opaque() {
        let xrgb = Format::from_id(VIRTIO_GPU_FORMAT_B8G8R8X8_UNORM).unwrap();
        assert_eq!(xrgb.to_rgba([1, 2, 3, 0]), [3, 2, 1, 0xff]);
        assert_eq!(Format::CURSOR.to_rgba([1, 2, 3, 4]), [3, 2, 1, 4]);
    }
}
