//! The picture that the guest draws in each pixel format of the GPU device, and the host expects.

/// Pixels of a line, four bytes each.
pub const WIDTH: u32 = 64;
/// Lines.
pub const HEIGHT: u32 = 32;

/// The specification's formats (5.7.6.8): bytes of a pixel in their order, and the number. Outputs show them in
/// this order: blobs first, then 2D resources.
pub const FORMATS: [(&str, u32); 8] = [
    ("BGRA", 1),
    ("BGRX", 2),
    ("ARGB", 3),
    ("XRGB", 4),
    ("RGBA", 67),
    ("XBGR", 68),
    ("ABGR", 121),
    ("RGBX", 134),
];

/// The bytes of a pixel in round `round`.
pub fn pixel(x: u32, y: u32, round: u8) -> [u8; 4] {
    [
        x as u8,
        y as u8 ^ 0x40,
        (x * y) as u8,
        0xa5u8.rotate_left(round.into()),
    ]
}
