//! What stands in for a BIOS: the instructions at its entry, which reset the machine.
//!
//! Linux without EFI restarts a machine of hardware-reduced ACPI by jumping to the BIOS
//! (`arch/x86/kernel/reboot.c`, `reboot_init` and `BOOT_BIOS`).

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::{GuestMemory, layout};

/// Writes the instructions, in 16-bit code, to the BIOS's entry at F000:FFF0.
pub fn write(mem: &GuestMemory) -> Result<(), GuestMemoryError> {
    let [low, high] = layout::RESET_PORT.to_le_bytes();
    let code = [
        // mov dx, RESET_PORT
        0xba,
        low,
        high,
        // mov al, RESET_VALUE
        0xb0,
        layout::RESET_VALUE,
        // out dx, al
        0xee,
        // hlt, and again should anything wake it
        0xf4,
        0xeb,
        0xfd,
    ];
    mem.write_slice(&code, GuestAddress(layout::RESET_VECTOR))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_below_the_end_of_the_bios() {
        let mem = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        write(&mem).unwrap();
        let first: u8 = mem.read_obj(GuestAddress(layout::RESET_VECTOR)).unwrap();
        assert_eq!(first, 0xba);
    }
}
