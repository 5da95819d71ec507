//! Pictures in which no two pixels are alike: the guest draws them, and the host expects them.

/// Pixels of a picture's line, and lines.
pub const WIDTH: u32 = 640;
/// See [`WIDTH`].
pub const HEIGHT: u32 = 480;
/// Bytes of a picture; whole pages.
pub const SIZE: u64 = WIDTH as u64 * HEIGHT as u64 * 4;

/// The pixel of picture `number` at a place, as XRGB8888: like no other of it, nor of other pictures.
pub fn pixel(number: u32, x: u32, y: u32) -> u32 {
    let place = y * WIDTH + x;
    (place ^ number.wrapping_mul(0x0075_bcd1)).wrapping_mul(0x00e3_779b) & 0x00ff_ffff
}

/// Picture `number` as red, green and blue of each pixel.
pub fn picture(number: u32) -> Vec<u8> {
    places()
        .flat_map(|(x, y)| pixel(number, x, y).to_be_bytes().into_iter().skip(1))
        .collect()
}

/// All places, line by line.
pub fn places() -> impl Iterator<Item = (u32, u32)> {
    (0..HEIGHT).flat_map(|y| (0..WIDTH).map(move |x| (x, y)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_pixels_are_alike() {
        let mut all: Vec<_> = places().map(|(x, y)| pixel(1, x, y)).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len() as u64, SIZE / 4);
        assert_ne!(pixel(1, 5, 5), pixel(2, 5, 5));
        let rgb = pixel(3, 1, 0).to_be_bytes();
        assert_eq!(picture(3)[3..6], rgb[1..]);
    }
}
