//! Tens of thousands of renderer blobs, shown at once, and others that come and go meanwhile.

use std::{ops::Range, time::Instant};

use super::{
    PAGE,
    batch::{Command, MOST},
    blobs::{Blobs, create, map, unmap, unref},
};
use crate::{Result, ensure};

/// The region's pages: `hostmem=256M`.
const WINDOW: usize = (256 << 20) / PAGE;
/// The first and the last word of a page.
const WORDS: [usize; 2] = [0, PAGE - 4];
/// Something is said after so many: a silent guest hangs.
const STEP: usize = 10_000;

/// Has `count` blobs shown at once, each at the page of its number, and does `pairs` more RESOURCE_MAP_BLOB and
/// RESOURCE_UNMAP_BLOB meanwhile, of blobs that appear at all the other pages in turn. Every blob is blank at first and
/// holds what was written to it, wherever it appears.
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
    // Where the first was is room again, and nothing of it.
    all.show(1)?;
    all.take_away(0..1)?;
    Ok(format!("{count} blobs at once and {pairs} pairs"))
}

/// A blob's, which is never 0.
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

    /// Says which step was passed, if one was.
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
            // Each is shown as soon as it is made, as by Linux's driver: its descriptor is still there.
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

    /// In rounds: a batch of blobs appears, one of them is written to, and all disappear.
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
        // A page that the guest has touched takes a vCPU's exit: each step in a time of its own.
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
