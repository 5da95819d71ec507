//! QEMU's edu device (QEMU `docs/specs/edu.rst`): its ids and the registers of its DMA engine.

/// Vendor and device id.
pub const IDS: &str = "1234:11e8";
/// Vendor and device id of `ivshmem-plain`, whose BAR 2 is memory.
pub const MEMORY_IDS: &str = "1af4:1110";
/// Register of the bus address that the DMA engine reads.
pub const DMA_SOURCE: usize = 0x80;
/// Register of the bus address that the DMA engine writes.
pub const DMA_DESTINATION: usize = 0x88;
/// Register of the number of bytes.
pub const DMA_COUNT: usize = 0x90;
/// Register of commands; bit 0 stays set while a transfer runs.
pub const DMA_COMMAND: usize = 0x98;
/// The address of the device's own buffer, as the DMA engine sees it.
pub const BUFFER: u64 = 0x40000;
/// Bytes of that buffer.
pub const BUFFER_LEN: usize = 4096;
