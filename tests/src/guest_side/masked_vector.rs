//! A vector of the entropy device that a guest program masks in the MSI-X table, while its driver works.

use std::{
    fs::File,
    io::Read,
    thread,
    time::{Duration, Instant},
};

use crate::{Context, Failure, Result, common::pci::Function, ensure};

const ENTROPY: &str = "1af4:1044";
/// Offsets in BAR 0 at which Fanlight has the MSI-X table and its pending bits.
const TABLE: usize = 0x4000;
const PENDING: usize = 0x7000;
/// Length of an entry in the table, and the offset of Vector Control in it (PCI 3.0, 6.8.2).
const ENTRY: usize = 16;
const CONTROL: usize = 12;
const MASKED: u32 = 1;
/// Linux gives the first vector to the configuration and the next one to the queue.
const VECTOR: usize = 1;
/// Far longer than the device takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Masks the vector of the device's queue and reads from the device. The interrupt must be pending, and come when the
/// vector is unmasked.
pub fn wait_for_unmask() -> Result<()> {
    let registers = Function::only(ENTROPY)?.map(0)?;
    let control = TABLE + VECTOR * ENTRY + CONTROL;
    let is_pending = || registers.read::<u32>(PENDING) & (1 << VECTOR) != 0;
    registers.write(control, MASKED);
    let reader = thread::spawn(|| {
        // More than the driver has in its buffer.
        let mut bytes = [0; 4096];
        File::open("/dev/hwrng").and_then(|mut device| device.read_exact(&mut bytes))
    });
    let start = Instant::now();
    while !is_pending() {
        let late = start.elapsed() > PATIENCE;
        ensure(!late, "a masked vector is never pending")?;
        ensure(!reader.is_finished(), "a masked vector interrupted")?;
        thread::sleep(Duration::from_millis(10));
    }
    ensure(!reader.is_finished(), "the driver needed no interrupt")?;
    registers.write(control, 0u32);
    let read = reader.join().map_err(|_| Failure("a panic".into()))?;
    read.context("cannot read entropy")?;
    ensure(!is_pending(), "the vector is pending still")
}
