//! Renderer blobs, created and mapped by the guest's driver: many at once, and many in turn.

use std::{io::BufRead, time::Instant};

use super::drm::{Blob, PAGE, with_venus};
use crate::{Context, Failure, Result, ensure};

/// Creates `count` blobs, which exist at once, writes to each and reads that back. Then creates `pairs` more, one after
/// the other.
pub fn at_once(count: u64, pairs: u64) -> Result<String> {
    let gpu = with_venus()?;
    let mut all = Vec::new();
    for number in 0..count {
        let blob = Blob::new(&gpu, PAGE)?;
        let before = blob.read()?;
        if before != 0 {
            return Err(Failure(format!("blob {number} holds {before:#x}")));
        }
        blob.write(number + 1)?;
        all.push(blob);
    }
    for (number, blob) in (0..).zip(&all) {
        let word = blob.read()?;
        if word != number + 1 {
            return Err(Failure(format!("blob {number} holds {word:#x}")));
        }
    }
    let start = Instant::now();
    for _ in 0..pairs {
        Blob::new(&gpu, PAGE)?;
    }
    let took = start.elapsed().as_micros();
    Ok(format!("{count} blobs and {pairs} pairs in {took} us"))
}

/// Keeps a blob after its context has gone, as a program does that received a picture from another one.
pub fn outlive() -> Result<String> {
    const WORD: u64 = 0x1234_5678_9abc_def0;
    let gpu = with_venus()?;
    let blob = Blob::shareable(&gpu, PAGE)?;
    blob.write(WORD)?;
    let memory = blob.map_shared()?;
    drop(blob);
    drop(gpu);
    // The device handles commands in order: once the other blob exists, the context is gone.
    let other = with_venus()?;
    let other = Blob::new(&other, PAGE)?;
    other.write(!WORD)?;
    let found = [memory.read(0), other.read()?];
    ensure(found == [WORD, !WORD], format!("found {found:x?}"))?;
    Ok("a blob outlived its context".into())
}

/// Creates blobs until one cannot be used. Returns the reason.
pub fn until_refused() -> Result<String> {
    let gpu = with_venus()?;
    println!("agent: going on");
    for made in 0_u64.. {
        let used = Blob::new(&gpu, PAGE).and_then(|blob| {
            blob.write(made)?;
            blob.read()
        });
        if let Err(error) = used {
            return Ok(format!("refused after some: {error}"));
        }
    }
    Err(Failure("no blob was refused".into()))
}

/// Follows the lines of standard input: `others N` keeps N blobs mapped; `pairs N` maps N more in turn, writes to each
/// and unmaps it. Each line is answered by `agent: did NUMBER: … us.`, counted from 1.
pub fn serve() -> Result<String> {
    let gpu = with_venus()?;
    let mut others = Vec::new();
    println!("agent: ready");
    for (line, number) in std::io::stdin().lock().lines().zip(1..) {
        let line = line.context("cannot read a line")?;
        let words: Vec<_> = line.split_whitespace().collect();
        let [what, count] = words[..] else { break };
        let count: usize = count.parse().context("not a number")?;
        let start = Instant::now();
        match what {
            "others" => {
                while others.len() < count {
                    let blob = Blob::new(&gpu, PAGE)?;
                    blob.write(1)?;
                    others.push(blob);
                }
                others.truncate(count);
            }
            _ => {
                for _ in 0..count {
                    Blob::new(&gpu, PAGE)?.write(1)?;
                }
            }
        }
        println!("agent: did {number}: {} us.", start.elapsed().as_micros());
    }
    Ok("served".into())
}
