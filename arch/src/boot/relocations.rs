//! The relocations behind a kernel (Linux `arch/x86/tools/relocs.c`): which of its places hold
//! addresses that change when it is mapped elsewhere than it was linked.

use thiserror::Error;

/// `__START_KERNEL_map`: virtual address of physical address 0 in the kernel's mapping.
pub const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// The bytes behind the kernel as words, to be taken apart by [`Relocations::new`].
pub fn words(bytes: &[u8]) -> Vec<i32> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|word| i32::from_le_bytes(*word))
        .collect()
}

/// Lists of the places to change. An entry is a place's virtual address, the low 32 bits of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relocations<'a> {
    add64: &'a [i32],
    subtract32: &'a [i32],
    add32: &'a [i32],
}

impl<'a> Relocations<'a> {
    /// Takes the lists apart: each starts with a 0; 64-bit places first, then (before Linux 6.15)
    /// 32-bit places that are subtracted from, then 32-bit places. `None`: there are no such lists, and
    /// the kernel cannot be mapped elsewhere.
    pub fn new(words: &'a [i32]) -> Option<Self> {
        let first = words.iter().position(|&word| word == 0)?;
        let mut lists = words[first + 1..].split(|&word| word == 0);
        let add64 = lists.next()?;
        let second = lists.next()?;
        let third = lists.next();
        if lists.next().is_some() {
            return None;
        }
        Some(match third {
            None => Self {
                add64,
                subtract32: &[],
                add32: second,
            },
            Some(add32) => Self {
                add64,
                subtract32: second,
                add32,
            },
        })
    }

    /// Adds `offset` to every address in `image`, which is linked at physical `preferred`. Fails where
    /// a place is not in the image.
    pub fn apply(self, image: &mut [u8], preferred: u64, offset: u64) -> Result<(), OutsideImage> {
        let start = START_KERNEL_MAP.wrapping_add(preferred);
        let place = |address: i32| (i64::from(address) as u64).wrapping_sub(start) as usize;
        for &address in self.add64 {
            let value: &mut [u8; 8] = image
                .get_mut(place(address)..)
                .and_then(<[u8]>::first_chunk_mut)
                .ok_or(OutsideImage)?;
            *value = u64::from_le_bytes(*value)
                .wrapping_add(offset)
                .to_le_bytes();
        }
        for (list, delta) in [
            (self.add32, offset as u32),
            (self.subtract32, (offset as u32).wrapping_neg()),
        ] {
            for &address in list {
                let value: &mut [u8; 4] = image
                    .get_mut(place(address)..)
                    .and_then(<[u8]>::first_chunk_mut)
                    .ok_or(OutsideImage)?;
                *value = u32::from_le_bytes(*value).wrapping_add(delta).to_le_bytes();
            }
        }
        Ok(())
    }
}

/// The kernel is corrupt.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("a relocation lies outside of it")]
pub struct OutsideImage;

#[cfg(test)]
mod tests {
    use super::*;

    const PREFERRED: u64 = 0x100_0000;

    fn place(offset: u64) -> i32 {
        (START_KERNEL_MAP + PREFERRED + offset) as i32
    }

    #[test]
    fn two_and_three_lists_are_told_apart() {
        let two = words(&[0, 1, 2, 0, 3].map(i32::to_le_bytes).concat());
        assert_eq!(
            Relocations::new(&two),
            Some(Relocations {
                add64: &[1, 2],
                subtract32: &[],
                add32: &[3]
            })
        );
        let three = [0, 1, 0, 0, 3];
        assert_eq!(
            Relocations::new(&three),
            Some(Relocations {
                add64: &[1],
                subtract32: &[],
                add32: &[3]
            })
        );
        for none in [&[][..], &[1, 2], &[0, 1], &[0, 1, 0, 2, 0, 3, 0, 4]] {
            assert_eq!(Relocations::new(none), None);
        }
    }

    #[test]
    fn places_change_by_their_width_and_sign() {
        let mut image = [0; 24];
        image[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
        let words = [0, place(0), 0, place(8), 0, place(16)];
        let offset = 0x1_2000_0000;
        Relocations::new(&words)
            .unwrap()
            .apply(&mut image, PREFERRED, offset)
            .unwrap();
        assert_eq!(image[..8], offset.to_le_bytes());
        assert_eq!(image[8..12], 0xe000_0000u32.to_le_bytes());
        assert_eq!(image[12..16], [0; 4]);
        assert_eq!(image[16..20], 0x1fff_ffffu32.to_le_bytes());
    }

    #[test]
    fn places_outside_are_refused() {
        let mut image = [0; 24];
        for bad in [place(17), place(24), place(0).wrapping_sub(1), 1, i32::MAX] {
            let words = [0, bad, 0];
            let result = Relocations::new(&words)
                .unwrap()
                .apply(&mut image, PREFERRED, 0x20_0000);
            assert_eq!(result, Err(OutsideImage), "{bad:#x}");
        }
    }
}
