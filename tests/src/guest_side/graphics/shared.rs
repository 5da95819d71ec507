//! Renderer blobs that the guest shares with a passed-through device.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use super::drm::{Blob, PAGE, with_venus};
use crate::{
    Context, Failure, Result, ensure,
    guest_side::{drm::Device, edu::Edu},
};

/// A size that no other blob has, by which the driver's list identifies this one.
const SIZE: u64 = 37 * PAGE;
const WORDS: usize = PAGE as usize / 8;
/// Offsets in a blob at which the device reads and writes.
const FROM: usize = PAGE as usize;
const TO: usize = 5 * PAGE as usize;
/// The driver's list of mapped blobs, in a mounted debugfs: `START-END: SIZE: used`.
const LISTS: &str = "/sys/kernel/debug/dri";
const LIST: &str = "virtio-gpu-host-visible-mm";
/// The driver hears of the end of a blob in far less time.
const PATIENCE: Duration = Duration::from_secs(60);

/// The offset of the blob with our size in the host-visible region.
fn place() -> Result<Option<u64>> {
    let dirs = fs::read_dir(LISTS).context("cannot list the driver's files")?;
    let list = dirs
        .flatten()
        .find_map(|dir| fs::read_to_string(dir.path().join(LIST)).ok());
    let list = list.ok_or_else(|| Failure(format!("there is no {LIST}")))?;
    let ours = format!(": {SIZE}: used");
    let line = list.lines().find_map(|line| line.strip_suffix(&ours));
    let start = line.and_then(|range| range.trim().split('-').next());
    let start = start.map(|start| u64::from_str_radix(start.trim_start_matches("0x"), 16));
    start.transpose().context("the driver lists a bad address")
}

/// Creates a blob, and checks that it is mapped where the blob before was.
fn blob_at(gpu: &Device, shareable: bool, before: Option<u64>) -> Result<(Blob<'_>, u64)> {
    let blob = if shareable {
        Blob::shareable(gpu, SIZE)?
    } else {
        Blob::new(gpu, SIZE)?
    };
    // The driver waits until the device has mapped the blob.
    blob.map()?;
    let at = place()?.ok_or_else(|| Failure("the driver does not list the blob".into()))?;
    let same = before.is_none_or(|before| before == at);
    ensure(same, format!("the next blob is at {at:#x}"))?;
    Ok((blob, at))
}

/// Frees a blob, and waits until the driver knows that it is unmapped.
fn forget(blob: Blob<'_>) -> Result<()> {
    drop(blob);
    let start = Instant::now();
    while place()?.is_some() {
        ensure(start.elapsed() < PATIENCE, "the blob stays mapped")?;
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn pattern(index: usize, round: u64) -> u64 {
    (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round
}

/// Has the device copy within a shared blob. A blob at the same place that is not shared must be neither read nor
/// written.
pub fn with_a_device() -> Result<String> {
    let (edu, gpu) = (Edu::open()?, with_venus()?);
    let mut first = None;
    for round in 1..=2 {
        let (blob, at) = blob_at(&gpu, true, first)?;
        first = Some(at);
        let memory = blob.map()?;
        for index in 0..WORDS {
            memory.write(FROM + index * 8, pattern(index, round));
        }
        edu.copy(at + FROM as u64, at + TO as u64)?;
        let is_right = |index: &usize| memory.read::<u64>(TO + index * 8) == pattern(*index, round);
        let right = (0..WORDS).filter(is_right).count();
        let count = format!("{right} of {WORDS} words are right in round {round}");
        ensure(right == WORDS, count)?;
        drop(memory);
        forget(blob)?;

        let (secret, at) = blob_at(&gpu, false, first)?;
        let memory = secret.map()?;
        for index in 0..WORDS {
            memory.write(FROM + index * 8, !pattern(index, round));
        }
        // The device's buffer still has the shared blob's words.
        edu.write(at + TO as u64)?;
        let written = (0..WORDS).filter(|index| memory.read::<u64>(TO + index * 8) != 0);
        let written = written.count();
        let count = format!("the device wrote {written} words of a blob that is not shared");
        ensure(written == 0, count)?;
        edu.read(at + FROM as u64)?;
        drop(memory);
        forget(secret)?;

        let (blob, at) = blob_at(&gpu, true, first)?;
        edu.write(at + TO as u64)?;
        let memory = blob.map()?;
        let is_secret =
            |index: &usize| memory.read::<u64>(TO + index * 8) == !pattern(*index, round);
        let read = (0..WORDS).filter(is_secret).count();
        let count = format!("the device read {read} words of a blob that is not shared");
        ensure(read == 0, count)?;
        drop(memory);
        forget(blob)?;
    }
    Ok("a device copied in blobs that are shared, and in no other".into())
}
