//! PNG files of what an output shows.

use std::io;

use fanlight_devices::virtio::gpu::Pixels;

/// Writes `pixels` as a PNG. Screens are opaque: alpha is left out.
pub fn write_png(pixels: &Pixels, to: impl io::Write) -> Result<(), png::EncodingError> {
    let mut encoder = png::Encoder::new(to, pixels.width, pixels.height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    let rgb: Vec<u8> = pixels
        .iter_rgba()
        .flat_map(|[red, green, blue, _]| [red, green, blue])
        .collect();
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&rgb)?;
    writer.finish()
}

#[cfg(test)]
mod tests {
    use fanlight_devices::virtio::gpu::Format;

    use super::*;

    #[test]
    fn a_png_reads_back() {
        let pixels = Pixels {
            format: Format::CURSOR,
            width: 2,
            height: 1,
            bytes: vec![1, 2, 3, 4, 5, 6, 7, 8],
        };
        let mut file = Vec::new();
        write_png(&pixels, &mut file).unwrap();
        let mut reader = png::Decoder::new(io::Cursor::new(file))
            .read_info()
            .unwrap();
        let mut back = vec![0; 6];
        reader.next_frame(&mut back).unwrap();
        assert_eq!(back, [3, 2, 1, 7, 6, 5]);
    }
}
