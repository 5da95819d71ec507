//! A bzImage's payload: the compressed kernel, in the formats that Linux's build offers and that are
//! still in use (Linux `lib/decompress.c`, `scripts/Makefile.lib`).
//!
//! bzip2, LZMA and LZO are left to the guest's own decompressor.

use std::io::{self, BufRead, Read};

use thiserror::Error;

/// How the payload is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Zstd,
    Gzip,
    Xz,
    Lz4,
}

/// Why a payload cannot be decompressed: it is corrupt.
#[derive(Debug, Error)]
pub enum PayloadError {
    /// The decoder's own words.
    #[error("{0}")]
    Decoder(String),
    /// It decompresses to another length than the kernel's build noted.
    #[error("it decompresses to {actual} bytes, not {expected}")]
    Length {
        /// What came out; one more than expected stands for any number of bytes more.
        actual: usize,
        /// What the build noted.
        expected: usize,
    },
}

impl From<io::Error> for PayloadError {
    fn from(error: io::Error) -> Self {
        Self::Decoder(error.to_string())
    }
}

/// A payload in one of the formats.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    /// How it is compressed.
    pub format: Format,
    /// Bytes that it decompresses to, as its last field claims.
    pub unpacked_len: usize,
    packed: &'a [u8],
}

impl<'a> Payload<'a> {
    /// Tells the format by the first bytes. `None`: none that is known here.
    ///
    /// The kernel's build appends the length to formats that do not end with it; gzip's own last field
    /// is the same.
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        let (format, has_own_length) = match bytes {
            [0x28, 0xb5, 0x2f, 0xfd, ..] => (Format::Zstd, false),
            [0x1f, 0x8b, ..] => (Format::Gzip, true),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => (Format::Xz, false),
            [0x02, 0x21, 0x4c, 0x18, ..] => (Format::Lz4, false),
            _ => return None,
        };
        let (body, length) = bytes.split_last_chunk()?;
        Some(Self {
            format,
            unpacked_len: u32::from_le_bytes(*length) as usize,
            packed: if has_own_length { bytes } else { body },
        })
    }

    /// Decompresses into all of `output`, whose length is [`Self::unpacked_len`].
    pub fn decode(self, output: &mut [u8]) -> Result<(), PayloadError> {
        let expected = output.len();
        let actual = match self.format {
            Format::Zstd => zstd::zstd_safe::decompress(output, self.packed).map_err(|code| {
                PayloadError::Decoder(zstd::zstd_safe::get_error_name(code).to_owned())
            })?,
            Format::Gzip => read_all(flate2::bufread::GzDecoder::new(self.packed), output)?,
            Format::Xz => read_all(liblzma::bufread::XzDecoder::new(self.packed), output)?,
            Format::Lz4 => lz4_legacy(self.packed, output)?,
        };
        if actual == expected {
            Ok(())
        } else {
            Err(PayloadError::Length { actual, expected })
        }
    }
}

/// Reads to the end, where decoders compare checksums.
fn read_all(mut decoder: impl Read, output: &mut [u8]) -> io::Result<usize> {
    let mut written = 0;
    loop {
        let mut beyond = [0];
        let rest = match &mut output[written..] {
            [] => &mut beyond[..],
            rest => rest,
        };
        match decoder.read(rest)? {
            0 => return Ok(written),
            read => written += read,
        }
        if written > output.len() {
            return Ok(written);
        }
    }
}

/// LZ4's legacy frame: blocks with a length in front, each of up to 8 MiB decompressed.
fn lz4_legacy(mut packed: &[u8], output: &mut [u8]) -> Result<usize, PayloadError> {
    const MAGIC_LEN: usize = 4;
    let cut_off = || PayloadError::Decoder("a block is cut off".into());
    packed.consume(MAGIC_LEN.min(packed.len()));
    let mut written = 0;
    while !packed.is_empty() {
        let (len, after) = packed.split_first_chunk().ok_or_else(cut_off)?;
        let len = u32::from_le_bytes(*len) as usize;
        let (block, rest) = after.split_at_checked(len).ok_or_else(cut_off)?;
        written += lz4_flex::block::decompress_into(block, &mut output[written..])
            .map_err(|error| PayloadError::Decoder(error.to_string()))?;
        packed = rest;
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::boot::test_image::{PACKERS, gzip, xz};

    fn decode(bytes: &[u8]) -> Option<Result<Vec<u8>, PayloadError>> {
        let payload = Payload::new(bytes)?;
        let mut output = vec![0; payload.unpacked_len.min(1 << 20)];
        Some(payload.decode(&mut output).map(|()| output))
    }

    #[test]
    fn every_format_gives_back_what_was_packed() {
        let file: Vec<u8> = (0..100_000u32)
            .flat_map(|n| (n / 7).to_le_bytes())
            .collect();
        for (format, pack) in PACKERS {
            let packed = pack(&file);
            let payload = Payload::new(&packed).unwrap();
            assert_eq!((payload.format, payload.unpacked_len), (format, file.len()));
            assert!(decode(&packed).unwrap().unwrap() == file, "{format:?}");
        }
    }

    #[test]
    fn a_wrong_length_is_an_error() {
        for (format, pack) in PACKERS {
            for wrong in [4999u32, 5001] {
                let mut packed = pack(&[7; 5000]);
                let at = packed.len() - 4;
                packed[at..].copy_from_slice(&wrong.to_le_bytes());
                assert!(decode(&packed).unwrap().is_err(), "{format:?} {wrong}");
            }
        }
    }

    #[test]
    fn checksums_are_compared() {
        let file = [7; 5000];
        let mut packed = gzip(&file);
        let crc = packed.len() - 8;
        packed[crc] ^= 1;
        assert!(decode(&packed).unwrap().is_err());
        let mut packed = xz(&file);
        // The block's CRC lies in front of the index (8 bytes), the footer (12) and our length (4).
        let crc = packed.len() - 4 - 12 - 8 - 1;
        packed[crc] ^= 1;
        assert!(decode(&packed).unwrap().is_err());
    }

    #[test]
    fn other_formats_are_not_ours() {
        for bytes in [&b"BZh9xxxxx"[..], b"", b"\x89LZO\0\r\n", &[0x28, 0xb5]] {
            assert!(Payload::new(bytes).is_none());
        }
    }

    proptest! {
        #[test]
        fn corrupt_payloads_are_survived(
            which in 0..PACKERS.len(),
            at in any::<prop::sample::Index>(),
            value in any::<u8>(),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut packed = PACKERS[which].1(&[7; 5000]);
            let at = at.index(packed.len());
            packed[at] = value;
            packed.truncate(packed.len() - cut.index(packed.len()) % 16);
            let _ = decode(&packed);
        }
    }
}
