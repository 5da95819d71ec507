//! Where a randomized kernel goes (Linux `arch/x86/boot/compressed/kaslr.c`): its physical place, and
//! independent of it the virtual address that it is mapped at.

use rustix::rand::{GetRandomFlags, getrandom};

/// `KERNEL_IMAGE_SIZE` of a kernel that randomizes its base: how far its mapping reaches.
pub const KERNEL_IMAGE_SIZE: u64 = 1 << 30;
/// Floor for physical bases: below it lie the loader's own tables, and the part of the decompressed
/// file in front of its first segment.
pub const MIN_PHYSICAL_BASE: u64 = 16 << 20;

/// What the command line lets vary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kaslr {
    /// Nothing: `nokaslr`.
    Off,
    /// Virtual addresses: the guest is told not to use all of its memory, so the usual place is safest.
    Virtual,
    /// Virtual addresses and the physical place.
    Full,
}

impl Kaslr {
    /// Reads the kernel's own options.
    pub fn from_cmdline(cmdline: &str) -> Self {
        let has = |matches: fn(&str) -> bool| cmdline.split_whitespace().any(matches);
        if has(|word| word == "nokaslr") {
            Self::Off
        } else if has(|word| word.starts_with("mem=") || word.starts_with("memmap=")) {
            Self::Virtual
        } else {
            Self::Full
        }
    }
}

/// A place for `span` bytes between [`MIN_PHYSICAL_BASE`] and `room_end`, if there is one.
pub fn random_base(alignment: u64, span: u64, room_end: u64) -> Option<u64> {
    let first = MIN_PHYSICAL_BASE.next_multiple_of(alignment);
    let slots = room_end.checked_sub(first)?.checked_sub(span)? / alignment + 1;
    Some(first + random_below(slots) * alignment)
}

/// What to add to every virtual address of a kernel of `span` bytes linked at physical `preferred`, as
/// `find_random_virt_addr` chooses it.
pub fn random_virtual_offset(alignment: u64, span: u64, preferred: u64) -> u64 {
    let room = KERNEL_IMAGE_SIZE
        .saturating_sub(preferred)
        .saturating_sub(span);
    random_below(room / alignment + 1) * alignment
}

/// A random number below `bound`, which is not 0. The bias is below 2⁻³².
fn random_below(bound: u64) -> u64 {
    let mut bytes = [0; 8];
    // This cannot fail once the host has collected randomness, which it does as it boots; before, the
    // kernel stays where it would be without randomization.
    let _ = getrandom(&mut bytes, GetRandomFlags::NONBLOCK);
    u64::from_le_bytes(bytes) % bound
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALIGNMENT: u64 = 2 << 20;

    #[test]
    fn the_command_line_decides() {
        for (cmdline, kaslr) in [
            ("", Kaslr::Full),
            ("console=ttyS0 nokaslr", Kaslr::Off),
            ("nokaslr mem=1G", Kaslr::Off),
            ("nokaslrx xmem=1G", Kaslr::Full),
            ("mem=1G quiet", Kaslr::Virtual),
            ("memmap=64M$1G", Kaslr::Virtual),
        ] {
            assert_eq!(Kaslr::from_cmdline(cmdline), kaslr, "{cmdline}");
        }
    }

    #[test]
    fn the_last_slot_ends_where_the_room_does() {
        let span = 60 << 20;
        assert_eq!(
            random_base(ALIGNMENT, span, MIN_PHYSICAL_BASE + span - 1),
            None
        );
        assert_eq!(random_base(ALIGNMENT, span, 0), None);
        let exact = MIN_PHYSICAL_BASE + span;
        assert_eq!(random_base(ALIGNMENT, span, exact), Some(MIN_PHYSICAL_BASE));
        for _ in 0..100 {
            let base = random_base(ALIGNMENT, span, 256 << 20).unwrap();
            assert!(base >= MIN_PHYSICAL_BASE && base + span <= 256 << 20);
            assert_eq!(base % ALIGNMENT, 0);
        }
    }

    #[test]
    fn the_mapping_holds_the_kernel_at_every_offset() {
        let (span, preferred) = (60 << 20, 16 << 20);
        let offsets: Vec<u64> = (0..100)
            .map(|_| random_virtual_offset(ALIGNMENT, span, preferred))
            .collect();
        for offset in &offsets {
            assert!(preferred + offset + span <= KERNEL_IMAGE_SIZE);
            assert_eq!(offset % ALIGNMENT, 0);
        }
        assert!(offsets.iter().any(|offset| *offset != offsets[0]));
        assert_eq!(random_virtual_offset(ALIGNMENT, 2 << 30, preferred), 0);
    }
}
