//! EDID 1.4 of an output (VESA E-EDID A.2). A DisplayID 1.3 extension holds modes for which the timing descriptor has
//! no room.

use super::output::Mode;

const BLOCK: usize = 128;
const HEADER: [u8; 8] = [0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0];
/// Three letters of five bits. Not in the UEFI forum's registry.
const MANUFACTURER: &[u8; 3] = b"FLT";
const PRODUCT: u16 = 1;
/// A mark in place of the week, and the year of the model, 2025, from 1990 on.
const MODEL_YEAR: [u8; 2] = [0xff, 35];
/// Digital, 8 bits a colour, no particular connector.
const DIGITAL_8_BITS: u8 = 0xa0;
/// Gamma 2.2.
const GAMMA: u8 = 120;
const FEATURE_SRGB: u8 = 1 << 2;
/// The first timing is the panel's own.
const FEATURE_NATIVE_TIMING: u8 = 1 << 1;
/// Chromaticity of sRGB.
const SRGB: [u8; 10] = [0xee, 0x91, 0xa3, 0x54, 0x4c, 0x99, 0x26, 0x0f, 0x50, 0x54];
/// 640x480, 800x600 and 1024x768 at 60 Hz.
const ESTABLISHED: [u8; 3] = [0x21, 0x08, 0];
/// Sizes that programs like to choose, all at 60 Hz: width and the code of its aspect ratio.
const STANDARD: [(u16, u8); 8] = [
    (1280, ASPECT_16_9),
    (1280, ASPECT_16_10),
    (1280, ASPECT_5_4),
    (1440, ASPECT_16_10),
    (1600, ASPECT_16_9),
    (1600, ASPECT_4_3),
    (1680, ASPECT_16_10),
    (1920, ASPECT_16_9),
];
const ASPECT_16_10: u8 = 0;
const ASPECT_4_3: u8 = 1;
const ASPECT_5_4: u8 = 2;
const ASPECT_16_9: u8 = 3;

const TAG_PRODUCT_NAME: u8 = 0xfc;
const TAG_SERIAL: u8 = 0xff;
const TAG_DUMMY: u8 = 0x10;
/// Characters of a text descriptor.
pub const NAME_MAX: usize = 13;

const DISPLAYID_TAG: u8 = 0x70;
const DISPLAYID_VERSION_1_3: u8 = 0x13;
/// Product type of the section: a monitor of its own.
const DISPLAYID_MONITOR: u8 = 3;
const DISPLAYID_PRODUCT: u8 = 0;
const DISPLAYID_PARAMETERS: u8 = 1;
/// Bits of a colour less one, as the display shows them and as it takes them.
const DISPLAYID_8_BITS: u8 = 0x77;
const DISPLAYID_INTERFACE: u8 = 0x0f;
/// DisplayPort with one link: the section must name a connector.
const DISPLAYID_DISPLAYPORT: u8 = 0x91;
const DISPLAYPORT_1_1: u8 = 0x11;
const DISPLAYID_RGB_8_BITS: u8 = 1 << 1;
const DISPLAYID_TYPE_1_TIMING: u8 = 0x03;
const DISPLAYID_TIMING_PREFERRED: u8 = 1 << 7;
/// Flags of a timing whose aspect ratio is none of the usual.
const DISPLAYID_ASPECT_OTHER: u8 = 8;
const DISPLAYID_POSITIVE_SYNC: u16 = 1 << 15;

/// A mode that every descriptor has room for, where the wanted one does not fit.
const FALLBACK: Mode = Mode {
    width: 1920,
    height: 1080,
};

/// A mode's timing: what is visible and what is not, in pixels and lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Timing {
    mode: Mode,
    clock_khz: u64,
    h_blank: u32,
    h_front: u32,
    h_sync: u32,
    v_blank: u32,
    v_front: u32,
    v_sync: u32,
}

impl Timing {
    /// Reduced blanking at 60 Hz (VESA CVT 1.2, reduced blanking version 1).
    fn reduced_blanking(mode: Mode) -> Self {
        const REFRESH: u64 = 60;
        const MIN_V_BLANK_NS: u64 = 460_000;
        const CLOCK_STEP_KHZ: u64 = 250;
        const H_BLANK: u32 = 160;
        const H_FRONT: u32 = 48;
        const H_SYNC: u32 = 32;
        const V_FRONT: u32 = 3;
        const MIN_V_BACK: u32 = 6;
        /// A descriptor must not say less than 10 MHz: small modes have more blanking.
        const MIN_CLOCK_KHZ: u64 = 10_250;
        let v_sync = match (mode.width, mode.height) {
            (w, h) if w * 3 == h * 4 => 4,
            (w, h) if w * 9 == h * 16 => 5,
            (w, h) if w * 10 == h * 16 => 6,
            (w, h) if w * 4 == h * 5 || w * 9 == h * 15 => 7,
            _ => 10,
        };
        let visible_ns = 1_000_000_000 / REFRESH - MIN_V_BLANK_NS;
        let lines = (MIN_V_BLANK_NS * u64::from(mode.height) / visible_ns + 1) as u32;
        let v_blank = lines.max(V_FRONT + v_sync + MIN_V_BACK);
        let v_total = u64::from(mode.height + v_blank);
        let least = (MIN_CLOCK_KHZ * 1000).div_ceil(REFRESH * v_total) as u32;
        let h_blank = H_BLANK.max(least.saturating_sub(mode.width));
        let khz = REFRESH * u64::from(mode.width + h_blank) * v_total / 1000;
        Self {
            mode,
            clock_khz: khz / CLOCK_STEP_KHZ * CLOCK_STEP_KHZ,
            h_blank,
            h_front: H_FRONT,
            h_sync: H_SYNC,
            v_blank,
            v_front: V_FRONT,
            v_sync,
        }
    }

    /// Whether a detailed timing descriptor has room for it (3.10.2).
    fn fits_descriptor(&self) -> bool {
        self.mode.width < 1 << 12
            && self.mode.height < 1 << 12
            && self.v_blank < 1 << 12
            && self.clock_khz / 10 <= u64::from(u16::MAX)
    }

    /// Detailed timing descriptor (3.10.2): separate syncs, the horizontal one positive.
    fn descriptor(&self, (width_mm, height_mm): (u32, u32)) -> [u8; 18] {
        const DIGITAL_SEPARATE_H_POSITIVE: u8 = 0x1a;
        let clock = (self.clock_khz / 10) as u16;
        let (h, v) = (self.mode.width, self.mode.height);
        let high = |a: u32, b: u32| ((a >> 8) as u8) << 4 | (b >> 8) as u8;
        let [clock_low, clock_high] = clock.to_le_bytes();
        [
            clock_low,
            clock_high,
            h as u8,
            self.h_blank as u8,
            high(h, self.h_blank),
            v as u8,
            self.v_blank as u8,
            high(v, self.v_blank),
            self.h_front as u8,
            self.h_sync as u8,
            (self.v_front as u8) << 4 | (self.v_sync as u8 & 0xf),
            0,
            width_mm as u8,
            height_mm as u8,
            high(width_mm, height_mm),
            0,
            0,
            DIGITAL_SEPARATE_H_POSITIVE,
        ]
    }

    /// Type I detailed timing (DisplayID 1.3, 4.4.1); every field is one less than it means.
    fn type_1(&self) -> [u8; 20] {
        let [c0, c1, c2, ..] = ((self.clock_khz / 10 - 1) as u32).to_le_bytes();
        let fields = [
            (self.mode.width - 1) as u16,
            (self.h_blank - 1) as u16,
            (self.h_front - 1) as u16 | DISPLAYID_POSITIVE_SYNC,
            (self.h_sync - 1) as u16,
            (self.mode.height - 1) as u16,
            (self.v_blank - 1) as u16,
            (self.v_front - 1) as u16,
            (self.v_sync - 1) as u16,
        ];
        let mut bytes = [0; 20];
        bytes[..4].copy_from_slice(&[
            c0,
            c1,
            c2,
            DISPLAYID_TIMING_PREFERRED | DISPLAYID_ASPECT_OTHER,
        ]);
        for (to, field) in bytes[4..].chunks_exact_mut(2).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }
}

/// Sets the last byte so that all bytes add up to nothing.
fn seal(block: &mut [u8]) {
    if let Some((last, rest)) = block.split_last_mut() {
        *last = rest.iter().fold(0u8, |sum, &byte| sum.wrapping_sub(byte));
    }
}

fn text(tag: u8, text: &str) -> [u8; 18] {
    let mut descriptor = [b' '; 18];
    descriptor[..5].copy_from_slice(&[0, 0, 0, tag, 0]);
    let room = &mut descriptor[5..];
    let len = text.len().min(room.len());
    room[..len].copy_from_slice(&text.as_bytes()[..len]);
    if let Some(end) = room.get_mut(len) {
        *end = b'\n';
    }
    descriptor
}

/// The EDID of an output whose own mode is `mode`; `name` is printable ASCII, of which the first
/// [`NAME_MAX`] characters count.
pub fn edid(mode: Mode, name: &str, index: usize) -> Vec<u8> {
    let timing = Timing::reduced_blanking(mode);
    let fits = timing.fits_descriptor();
    let mut edid = vec![0; BLOCK];
    let base = &mut edid[..];
    base[..8].copy_from_slice(&HEADER);
    let letters = MANUFACTURER.map(|letter| u16::from(letter - b'A' + 1));
    let manufacturer = letters[0] << 10 | letters[1] << 5 | letters[2];
    base[8..10].copy_from_slice(&manufacturer.to_be_bytes());
    base[10..12].copy_from_slice(&PRODUCT.to_le_bytes());
    base[12..16].copy_from_slice(&(index as u32 + 1).to_le_bytes());
    base[16..18].copy_from_slice(&MODEL_YEAR);
    base[18..20].copy_from_slice(&[1, 4]);
    base[20] = DIGITAL_8_BITS;
    let size = said_size(mode);
    base[21..23].copy_from_slice(&[(size.0 / 10) as u8, (size.1 / 10) as u8]);
    base[23] = GAMMA;
    base[24] = FEATURE_SRGB | if fits { FEATURE_NATIVE_TIMING } else { 0 };
    base[25..35].copy_from_slice(&SRGB);
    base[35..38].copy_from_slice(&ESTABLISHED);
    for (to, (width, aspect)) in base[38..54].chunks_exact_mut(2).zip(STANDARD) {
        to.copy_from_slice(&[(width / 8 - 31) as u8, aspect << 6]);
    }
    let first = if fits {
        timing
    } else {
        Timing::reduced_blanking(FALLBACK)
    };
    let mut dummy = [0; 18];
    dummy[3] = TAG_DUMMY;
    let descriptors = [
        first.descriptor(size),
        text(TAG_PRODUCT_NAME, name),
        text(TAG_SERIAL, &format!("output-{index}")),
        dummy,
    ];
    base[54..126].copy_from_slice(descriptors.as_flattened());
    base[126] = u8::from(!fits);
    seal(base);
    if !fits {
        edid.extend(displayid(&timing, index));
    }
    edid
}

/// Width and height in millimetres, or zeroes where the base block has no room for them.
fn said_size(mode: Mode) -> (u32, u32) {
    let (width, height) = mode.millimetres();
    let fits = |mm: u32| (1..=u32::from(u8::MAX)).contains(&(mm / 10));
    if fits(width) && fits(height) {
        (width, height)
    } else {
        (0, 0)
    }
}

/// The longer side by the shorter, in hundredths beyond one.
fn aspect(mode: Mode) -> u8 {
    let (long, short) = (mode.width.max(mode.height), mode.width.min(mode.height));
    u8::try_from(long * 100 / short - 100).unwrap_or(u8::MAX)
}

/// An extension block of one DisplayID section: the maker of the output, and one timing.
fn displayid(timing: &Timing, index: usize) -> [u8; BLOCK] {
    const HEAD: usize = 5;
    let mut data = Vec::with_capacity(BLOCK);
    let mut add = |tag: u8, content: &[u8]| {
        data.extend([tag, 0, content.len() as u8]);
        data.extend(content);
    };
    let mut identity = Vec::new();
    identity.extend(MANUFACTURER);
    identity.extend(PRODUCT.to_le_bytes());
    identity.extend((index as u32 + 1).to_le_bytes());
    identity.extend([MODEL_YEAR[0], MODEL_YEAR[1] - 10]);
    identity.push(0);
    add(DISPLAYID_PRODUCT, &identity);
    let mut parameters = Vec::new();
    let (width_mm, height_mm) = said_size(timing.mode);
    for field in [
        width_mm * 10,
        height_mm * 10,
        timing.mode.width,
        timing.mode.height,
    ] {
        parameters.extend((field as u16).to_le_bytes());
    }
    parameters.extend([0, GAMMA, aspect(timing.mode), DISPLAYID_8_BITS]);
    add(DISPLAYID_PARAMETERS, &parameters);
    let mut interface = [0; 10];
    interface[..3].copy_from_slice(&[DISPLAYID_DISPLAYPORT, DISPLAYPORT_1_1, DISPLAYID_RGB_8_BITS]);
    add(DISPLAYID_INTERFACE, &interface);
    add(DISPLAYID_TYPE_1_TIMING, &timing.type_1());
    let mut block = [0; BLOCK];
    block[..HEAD].copy_from_slice(&[
        DISPLAYID_TAG,
        DISPLAYID_VERSION_1_3,
        data.len() as u8,
        DISPLAYID_MONITOR,
        0,
    ]);
    let end = HEAD + data.len();
    block[HEAD..end].copy_from_slice(&data);
    seal(&mut block[1..=end]);
    seal(&mut block);
    block
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mode(width: u32, height: u32) -> Mode {
        Mode { width, height }
    }

    #[test]
    fn timings_are_those_of_the_cvt_tables() {
        // VESA's spreadsheet for 1920x1080 and 2560x1440 at 60 Hz with reduced blanking.
        let full_hd = Timing::reduced_blanking(mode(1920, 1080));
        assert_eq!((full_hd.clock_khz, full_hd.v_blank), (138_500, 31));
        let qhd = Timing::reduced_blanking(mode(2560, 1440));
        assert_eq!((qhd.clock_khz, qhd.v_blank), (241_500, 41));
    }

    #[test]
    fn large_modes_have_an_extension() {
        assert_eq!(edid(mode(3840, 2160), "x", 0).len(), BLOCK);
        let large = edid(mode(7680, 4320), "x", 0);
        assert_eq!(large.len(), 2 * BLOCK);
        assert_eq!(large[126], 1);
        let width = 7679u16.to_le_bytes();
        assert!(large[BLOCK..].windows(2).any(|pair| pair == width));
    }

    #[test]
    fn a_long_name_is_cut() {
        let edid = edid(mode(640, 480), "a name that is too long", 3);
        assert_eq!(&edid[77..90], b"a name that i");
        assert_eq!(edid[12], 4);
    }

    proptest! {
        #[test]
        fn every_block_adds_up(width in Mode::MIN..=Mode::MAX, height in Mode::MIN..=Mode::MAX, index in 0usize..16) {
            let edid = edid(mode(width, height), "Fanlight", index);
            for block in edid.chunks(BLOCK) {
                prop_assert_eq!(block.iter().fold(0u8, |sum, &b| sum.wrapping_add(b)), 0);
            }
            if edid.len() == BLOCK {
                let dtd = &edid[54..72];
                prop_assert_eq!(u32::from(dtd[2]) | u32::from(dtd[4] >> 4) << 8, width);
                prop_assert_eq!(u32::from(dtd[5]) | u32::from(dtd[7] >> 4) << 8, height);
            }
        }
    }
}
