//! A watchdog for the processors of L1. The emulator now and then stops one of them for good while the others go on. A
//! guest on it hangs, which says nothing about the program under test.

use std::{
    fs, process, thread,
    time::{Duration, Instant},
};

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use rustix::thread::{CpuSet, sched_setaffinity};

/// A processor that runs takes a waiting thread within milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);
const BEAT: Duration = Duration::from_millis(500);
/// Exit status of the process that runs L1's tests, and so of L1.
const STANDSTILL: i32 = 3;

/// Watches every processor from a thread on each, and ends the process when one stands still. No guest runs on the
/// first one, but interrupts and kernel threads do.
pub fn watch() {
    let start = Instant::now();
    let Ok(processors) = fs::read_to_string("/proc/cpuinfo") else {
        return;
    };
    let lines = processors.lines();
    let count = lines.filter(|line| line.starts_with("processor")).count();
    let beats: Arc<Vec<_>> = Arc::new((0..count).map(|_| AtomicU64::new(0)).collect());
    for cpu in 0..count {
        let beats = beats.clone();
        thread::spawn(move || {
            let mut only = CpuSet::new();
            only.set(cpu);
            if sched_setaffinity(None, &only).is_err() {
                return;
            }
            loop {
                let now = start.elapsed();
                beats[cpu].store(now.as_millis() as u64, Ordering::Relaxed);
                let oldest = beats
                    .iter()
                    .map(|beat| Duration::from_millis(beat.load(Ordering::Relaxed)))
                    .min();
                if oldest.is_some_and(|oldest| now.saturating_sub(oldest) > PATIENCE) {
                    println!("fanlight: a processor of L1 stands still");
                    process::exit(STANDSTILL);
                }
                thread::sleep(BEAT);
            }
        });
    }
}
