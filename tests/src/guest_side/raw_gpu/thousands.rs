//! Tens of thousands of renderer blobs, mapped at once, and others that are mapped and unmapped meanwhile.

use std::{ops::Range, time::Instant};

use super::{
    PAGE,
    batch::{Command, MOST},
    blobs::{Blobs, create, map, unmap, unref},
};
use crate::{Result, ensure};

/// Pages of the region: `hostmem=256M`.
const WINDOW: usize = (256 << 20) / PAGE;
/// The first and the last word of a page.
const WORDS: [usize; 2] = [0, PAGE - 4];
/// Progress is printed after this many blobs: a silent guest counts as hanging.
const STEP: usize = 10_000;

/// Maps `count` blobs at once, each at the page of its number. Meanwhile sends `pairs` pairs of RESOURCE_MAP_BLOB and
/// RESOURCE_UNMAP_BLOB for other blobs, at all other pages in turn. Every blob is zero at first and keeps its bytes
/// wherever it is mapped.
pub fn at_once(count: usize, pairs: usize) -> Result<String> {
    ensure(count < WINDOW, "more blobs than the region has pages")?;
    let mut all = Thousands {
        blobs: Blobs::open()?,
        start: Instant::now(),
    };
    all.show(count)?;
    all.come_and_go(count, pairs)?;
    for index in 0..count {
        all.holds(index, id(index))?;
    }
    all.say("intact", count);
    all.take_away(0..count)?;
    // The first blob's place is free again, and a new blob there has none of its bytes.
    all.show(1)?;
    all.take_away(0..1)?;
    Ok(format!("{count} blobs at once and {pairs} pairs"))
}

/// Resource id of a blob, which is never 0.
fn id(index: usize) -> u32 {
    index as u32 + 1
}

struct Thousands {
    blobs: Blobs,
    start: Instant,
}

impl Thousands {
    fn say(&self, what: &str, count: usize) {
        let time = self.start.elapsed().as_millis();
        println!("agent: {count} {what} after {time} ms");
    }

    /// Prints which step was passed, if any.
    fn say_steps(&self, what: &str, done: Range<usize>) {
        let step = done.end / STEP;
        if step != done.start / STEP {
            self.say(what, step * STEP);
        }
    }

    fn send(&mut self, commands: impl Iterator<Item = Command>) -> Result<()> {
        let commands: Vec<_> = commands.collect();
        commands
            .chunks(MOST)
            .try_for_each(|part| self.blobs.gpu.batch(part))
    }

    fn holds(&self, page: usize, expected: u32) -> Result<()> {
        for word in WORDS {
            let found: u32 = self.blobs.region.read(page * PAGE + word);
            let wrong = format!("page {page} holds {found:#x} at {word:#x}, not {expected:#x}");
            ensure(found == expected, wrong)?;
        }
        Ok(())
    }

    fn write(&self, page: usize, value: u32) {
        for word in WORDS {
            self.blobs.region.write(page * PAGE + word, value);
        }
    }

    fn show(&mut self, count: usize) -> Result<()> {
        for first in (0..count).step_by(MOST) {
            let part = first..count.min(first + MOST);
            // Each blob is mapped right after its creation, as by Linux's driver, while its descriptor is open.
            let make = |index| [create(id(index)), map(id(index), index)];
            self.send(part.clone().flat_map(make))?;
            for index in part.clone() {
                self.holds(index, 0)?;
                self.write(index, id(index));
            }
            self.say_steps("shown", part);
        }
        Ok(())
    }

    /// In each round a batch of blobs is mapped, one of them is written to, and all are unmapped.
    fn come_and_go(&mut self, count: usize, pairs: usize) -> Result<()> {
        let ids = id(count)..id(count + MOST);
        self.send(ids.clone().map(create))?;
        let mut written = [0; MOST];
        for (round, first) in (0..pairs).step_by(MOST).enumerate() {
            let done = pairs.min(first + MOST);
            let page = |pair: usize| count + pair % (WINDOW - count);
            let part = || (first..done).zip(ids.clone());
            self.send(part().map(|(pair, id)| map(id, page(pair))))?;
            let which = round % (done - first);
            self.holds(page(first + which), written[which])?;
            written[which] = id(round);
            self.write(page(first + which), written[which]);
            self.send(part().map(|(_, id)| unmap(id)))?;
            self.say_steps("pairs", first..done);
        }
        self.send(ids.map(unref))
    }

    fn take_away(&mut self, indices: Range<usize>) -> Result<()> {
        // Unmapping a page that the guest has touched makes a vCPU exit, so each step has its own time limit.
        let mut in_steps = |what: &str, command: fn(u32) -> Command| {
            for first in indices.clone().step_by(MOST) {
                let part = first..indices.end.min(first + MOST);
                self.send(part.clone().map(|index| command(id(index))))?;
                self.say_steps(what, part);
            }
            Ok(())
        };
        in_steps("taken away", unmap)?;
        in_steps("let go", unref)
    }
}
