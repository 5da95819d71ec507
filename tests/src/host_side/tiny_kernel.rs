//! Kernels of one instruction, for what needs no Linux.

/// An ELF file (ELF-64 1.5) with one segment, `code`, and the note that names it as its PVH entry.
pub fn tiny_kernel(code: [u8; 4]) -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    const ENTRY: u64 = 0x10_0000;
    /// `XEN_ELFNOTE_PHYS32_ENTRY`.
    const PHYS32_ENTRY: u32 = 18;
    let mut note = [4u32, 8, PHYS32_ENTRY].map(u32::to_le_bytes).concat();
    note.extend(b"Xen\0");
    note.extend(ENTRY.to_le_bytes());
    let note_at = HEADER + 2 * PROGRAM_HEADER;
    let code_at = note_at + note.len() as u64;
    let half = |words: &[u16]| {
        words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect::<Vec<_>>()
    };
    let word = |words: &[u32]| {
        words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect::<Vec<_>>()
    };
    let long = |words: &[u64]| {
        words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect::<Vec<_>>()
    };
    let program_header = |kind, flags, at, address, len: usize| {
        let len = len as u64;
        [
            word(&[kind, flags]),
            long(&[at, address, address, len, len, 4]),
        ]
        .concat()
    };
    [
        b"\x7fELF\x02\x01\x01".to_vec(),
        vec![0; 9],
        half(&[2, 62]),
        word(&[1]),
        long(&[ENTRY, HEADER, 0]),
        word(&[0]),
        half(&[HEADER as u16, PROGRAM_HEADER as u16, 2, 0, 0, 0]),
        program_header(4, 4, note_at, 0, note.len()),
        program_header(1, 5, code_at, ENTRY, code.len()),
        note,
        code.to_vec(),
    ]
    .concat()
}
