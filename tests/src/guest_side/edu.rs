//! QEMU's edu device (QEMU `docs/specs/edu`): its DMA engine accesses every bus address that it can reach, which proves
//! what other devices can reach.

use std::{
    fs::File,
    io::Read,
    thread,
    time::{Duration, Instant},
};

use crate::{
    Context, Failure, Result,
    common::{
        edu::{
            BUFFER, BUFFER_LEN, DMA_COMMAND, DMA_COUNT, DMA_DESTINATION, DMA_SOURCE, IDS,
            MEMORY_IDS,
        },
        pci::{Function, Mmio},
    },
    ensure,
    guest_side::noiommu::{Interrupt, NoIommu},
};

const DMA_START: u64 = 1;
const DMA_FROM_BUFFER: u64 = 2;
/// Bytes of the other device's memory that are mapped: the guest would need page tables for all of it.
const PART: u64 = 1 << 20;
/// Far longer than a transfer takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// The edu device.
pub struct Edu {
    registers: Mmio,
}

impl Edu {
    /// Opens the only edu device.
    pub fn open() -> Result<Self> {
        let function = Function::only(IDS)?;
        function.enable(true)?;
        Ok(Self {
            registers: function.map(0)?,
        })
    }

    fn transfer(&self, source: u64, destination: u64, command: u64) -> Result<()> {
        self.registers.write(DMA_SOURCE, source);
        self.registers.write(DMA_DESTINATION, destination);
        self.registers.write(DMA_COUNT, BUFFER_LEN as u64);
        self.registers.write(DMA_COMMAND, command | DMA_START);
        let start = Instant::now();
        while self.registers.read::<u64>(DMA_COMMAND) & DMA_START != 0 {
            ensure(start.elapsed() < PATIENCE, "the DMA never ends")?;
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Copies 4 KiB between two bus addresses through the device's buffer.
    pub fn copy(&self, from: u64, to: u64) -> Result<()> {
        self.read(from)?;
        self.write(to)
    }

    /// Fills the device's buffer of 4 KiB from a bus address.
    pub fn read(&self, from: u64) -> Result<()> {
        self.transfer(from, BUFFER, 0)
    }

    /// Writes the device's buffer to a bus address.
    pub fn write(&self, to: u64) -> Result<()> {
        self.transfer(BUFFER, to, DMA_FROM_BUFFER)
    }
}

/// Has the device copy within another device's memory, and compares; then again after that memory was off for a while.
pub fn copy_in_peer() -> Result<u64> {
    let (edu, peer) = (Edu::open()?, Function::only(MEMORY_IDS)?);
    peer.enable(true)?;
    let (address, _) = peer.bar(2)?;
    let memory = peer.map_part(2, 0..PART)?;
    let mut bytes = 0;
    for round in 1..=2u64 {
        let (from, to) = (0x3000, 0x20000 * round as usize);
        let words = BUFFER_LEN / 8;
        let pattern = |index: usize| (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round;
        for index in 0..words {
            memory.write(from + index * 8, pattern(index));
            memory.write(to + index * 8, 0u64);
        }
        edu.copy(address + from as u64, address + to as u64)?;
        let right =
            (0..words).filter(|&index| memory.read::<u64>(to + index * 8) == pattern(index));
        let right = right.count();
        if right != words {
            return Err(Failure(format!(
                "{right} of {words} words are right in round {round}"
            )));
        }
        bytes += BUFFER_LEN as u64;
        peer.enable(false)?;
        peer.enable(true)?;
    }
    Ok(bytes)
}

/// Has the device write to the other device's memory at first, and again while that memory is off, which must change
/// nothing. Returns the address that it wrote to.
pub fn write_to_absent_peer() -> Result<u64> {
    const AT: usize = 0x5000;
    let (edu, peer) = (Edu::open()?, Function::only(MEMORY_IDS)?);
    peer.enable(true)?;
    let (start, _) = peer.bar(2)?;
    let memory = peer.map_part(2, 0..PART)?;
    memory.write(AT, 1u64);
    let address = start + AT as u64;
    edu.read(address)?;
    memory.write(AT, 0u64);
    edu.write(address)?;
    let written = memory.read::<u64>(AT);
    ensure(written == 1, format!("the device wrote {written}"))?;
    memory.write(AT, 2u64);
    peer.enable(false)?;
    edu.write(address)?;
    peer.enable(true)?;
    let kept = memory.read::<u64>(AT);
    ensure(kept == 2, format!("memory that was off became {kept}"))?;
    Ok(address)
}

/// Writes `mark` at the end of the memory, which outlives the guest. Returns the value before.
pub fn swap_mark(mark: u64) -> Result<u64> {
    let peer = Function::only(MEMORY_IDS)?;
    peer.enable(true)?;
    let (_, len) = peer.bar(2)?;
    let memory = peer.map_part(2, len.saturating_sub(PART)..len)?;
    let at = PART as usize - 8;
    let before = memory.read(at);
    memory.write(at, mark);
    Ok(before)
}

/// Has the device interrupt `count` times through the guest's own vfio-pci, each time after the previous interrupt
/// arrived. Returns the total time. Calls `hold` before it gives the interrupt back.
pub fn interrupts(
    kind: Interrupt,
    count: u32,
    hold: impl FnOnce() -> Result<()>,
) -> Result<Duration> {
    const RAISE: usize = 0x60;
    const ACKNOWLEDGE: usize = 0x64;
    let edu = NoIommu::open(&Function::only(IDS)?)?;
    let registers = edu.map(0, 0, 4096)?;
    let heard = File::from(edu.hear(kind)?);
    let start = Instant::now();
    for _ in 0..count {
        registers.write(RAISE, 1u32);
        let mut total = [0; 8];
        (&heard).read_exact(&mut total).context("cannot wait")?;
        registers.write(ACKNOWLEDGE, 1u32);
        let total = u64::from_ne_bytes(total);
        ensure(total == 1, format!("{total} interrupts at once"))?;
        if kind == Interrupt::Intx {
            edu.unmask()?;
        }
    }
    let took = start.elapsed();
    hold()?;
    Ok(took)
}
