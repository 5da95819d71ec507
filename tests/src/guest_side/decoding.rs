//! Device memory that a guest program reads while another thread of it switches memory decoding off and on.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use crate::{Context, Failure, Result, common::pci::Function, ensure};

const PAGE: u64 = 4096;
const WORD: u32 = 0x600d_600d;
/// What a processor reads where nothing answers.
const NOTHING: u32 = u32::MAX;

/// Switches the memory of the only function with these ids off and on `rounds` times, while another thread reads a word
/// of BAR `bar`. The word must be there or nothing. Returns how many reads found the one and the other.
pub fn switch_under_reads(ids: &str, bar: usize, rounds: u64) -> Result<[u64; 2]> {
    let function = Function::only(ids)?;
    function.enable(true)?;
    function.map_part(bar, 0..PAGE)?.write(0, WORD);
    let done = AtomicBool::new(false);
    let read = || {
        let memory = function.map_part(bar, 0..PAGE)?;
        let mut reads = [0; 2];
        while !done.load(Ordering::Relaxed) {
            match memory.read::<u32>(0) {
                WORD => reads[0] += 1,
                NOTHING => reads[1] += 1,
                other => return Err(Failure(format!("read {other:#x}"))),
            }
        }
        Ok(reads)
    };
    let switch = || {
        (0..rounds).try_for_each(|_| {
            function.enable(false)?;
            function.enable(true)
        })
    };
    let (switched, reads) = thread::scope(|scope| {
        let reader = scope.spawn(read);
        let switched = switch();
        done.store(true, Ordering::Relaxed);
        (switched, reader.join())
    });
    switched?;
    let reads = reads.map_err(|_| Failure("the reader panicked".into()))?;
    let reads = reads.context("the reader failed")?;
    ensure(!reads.contains(&0), format!("reads: {reads:?}"))?;
    Ok(reads)
}
