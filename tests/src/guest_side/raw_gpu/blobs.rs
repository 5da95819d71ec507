//! Renderer blobs, shown and taken away with nothing else: RESOURCE_MAP_BLOB and RESOURCE_UNMAP_BLOB, which
//! Linux's driver sends only together with what makes a blob and takes it apart (Virtio 1.4, 5.7.6.9 and 5.7.6.10).

use std::{
    io::BufRead,
    time::{Duration, Instant},
};

use super::{
    Gpu, PAGE,
    batch::{Command, MOST},
    capability,
};
use crate::{Context, Failure, Result, common::pci::Mmio};

/// VIRGL, RESOURCE_BLOB, CONTEXT_INIT; VERSION_1.
const FEATURES: [u32; 2] = [1 | 1 << 3 | 1 << 4, 1];
const UNREF: u32 = 0x102;
const CREATE_BLOB: u32 = 0x10c;
const CREATE_CONTEXT: u32 = 0x200;
const MAP_BLOB: u32 = 0x208;
const UNMAP_BLOB: u32 = 0x209;
const CAPSET_VENUS: u32 = 4;
const HOST3D: u32 = 2;
const USE_MAPPABLE: u32 = 1;
/// The capability of shared memory (4.1.4.7).
const SHARED_MEMORY: u8 = 8;
const CONTEXT: u32 = 1;
/// The resource that comes and goes; others have the numbers after it.
const GUEST: u32 = 1;

/// The device with a context for Vulkan, whose blobs can be made without a command stream.
pub(super) struct Blobs {
    pub(super) gpu: Gpu,
    pub(super) region: Mmio,
    others: u32,
}

/// Makes a blob of a page.
pub(super) fn create(id: u32) -> Command {
    Command {
        context: CONTEXT,
        type_: CREATE_BLOB,
        body: vec![id, HOST3D, USE_MAPPABLE, 0, 0, 0, PAGE as u32, 0],
    }
}

/// Shows a blob at a page of the region.
pub(super) fn map(id: u32, page: usize) -> Command {
    let offset = (page * PAGE) as u64;
    Command {
        context: 0,
        type_: MAP_BLOB,
        body: vec![id, 0, offset as u32, (offset >> 32) as u32],
    }
}

/// Takes it away.
pub(super) fn unmap(id: u32) -> Command {
    Command {
        context: 0,
        type_: UNMAP_BLOB,
        body: vec![id, 0],
    }
}

/// Lets it go.
pub(super) fn unref(id: u32) -> Command {
    Command {
        context: 0,
        type_: UNREF,
        body: vec![id, 0],
    }
}

impl Blobs {
    pub(super) fn open() -> Result<Self> {
        let mut gpu = Gpu::open(FEATURES)?;
        let (region, ..) = capability(&gpu.function, SHARED_MEMORY)?;
        // No name, and the kind of context.
        let mut create = vec![0, CAPSET_VENUS];
        create.extend([0; 16]);
        gpu.command_of(CONTEXT, CREATE_CONTEXT, &create)?;
        Ok(Self {
            gpu,
            region,
            others: 0,
        })
    }

    fn one(&mut self, command: &Command) -> Result<()> {
        let Command {
            context,
            type_,
            body,
        } = command;
        self.gpu.command_of(*context, *type_, body)
    }

    /// Shows a blob at the page of its number.
    fn map(&mut self, id: u32) -> Result<()> {
        self.one(&map(id, id as usize))
    }

    /// Writes to a blob that is shown, and finds it there.
    fn touch(&self, id: u32) -> Result<()> {
        let at = id as usize * PAGE;
        self.region.write(at, id);
        match self.region.read::<u32>(at) {
            word if word == id => Ok(()),
            word => Err(Failure(format!("blob {id} holds {word:#x}"))),
        }
    }

    /// Has so many others shown.
    fn others(&mut self, count: u32) -> Result<()> {
        while self.others < count {
            let id = GUEST + 1 + self.others;
            self.one(&create(id))?;
            self.map(id)?;
            self.touch(id)?;
            self.others += 1;
        }
        Ok(())
    }

    /// Shows so many blobs and takes them away, one after the other; how long that took without making them.
    fn pairs(&mut self, count: u32) -> Result<Duration> {
        let mut took = Duration::ZERO;
        for _ in 0..count {
            self.one(&create(GUEST))?;
            took += self.pair()?;
            self.one(&unref(GUEST))?;
        }
        Ok(took)
    }

    /// The same of one blob.
    fn again(&mut self, count: u32) -> Result<Duration> {
        let mut took = Duration::ZERO;
        self.one(&create(GUEST))?;
        for _ in 0..count {
            took += self.pair()?;
        }
        self.one(&unref(GUEST))?;
        Ok(took)
    }

    /// Shows as many blobs at once as can be told for one notification, and takes them away together, so many times.
    fn batches(&mut self, count: u32) -> Result<Duration> {
        let mut took = Duration::ZERO;
        let first = GUEST + 1 + self.others;
        let ids = first..first + MOST as u32;
        let all = |command: fn(u32) -> Command| ids.clone().map(command).collect::<Vec<_>>();
        let shown = |id| map(id, id as usize);
        self.gpu.batch(&all(create))?;
        for _ in 0..count {
            let start = Instant::now();
            self.gpu.batch(&all(shown))?;
            took += start.elapsed();
            ids.clone().try_for_each(|id| self.touch(id))?;
            let start = Instant::now();
            self.gpu.batch(&all(unmap))?;
            took += start.elapsed();
        }
        self.gpu.batch(&all(unref))?;
        Ok(took)
    }

    /// Between the two the guest writes to it, so that there is something to take away.
    fn pair(&mut self) -> Result<Duration> {
        let start = Instant::now();
        self.map(GUEST)?;
        let map = start.elapsed();
        self.touch(GUEST)?;
        let start = Instant::now();
        self.one(&unmap(GUEST))?;
        Ok(map + start.elapsed())
    }
}

/// Does what the lines of standard input say: `others N` has N blobs shown; `pairs N` shows N more, each a new one, and
/// takes them away, one after the other; `again N` does that with one blob; `batches N` does it N times with many, whose
/// commands come together. Each is answered by a line `agent: did NUMBER: … us.`, counted from 1.
pub fn serve() -> Result<String> {
    let mut blobs = Blobs::open()?;
    println!("agent: ready");
    for (line, number) in std::io::stdin().lock().lines().zip(1..) {
        let line = line.context("cannot read a line")?;
        let words: Vec<_> = line.split_whitespace().collect();
        let [what, count] = words[..] else { break };
        let count = count.parse().context("not a number")?;
        let took = match what {
            "others" => {
                let start = Instant::now();
                blobs.others(count)?;
                start.elapsed()
            }
            "again" => blobs.again(count)?,
            "batches" => blobs.batches(count)?,
            _ => blobs.pairs(count)?,
        };
        println!("agent: did {number}: {} us.", took.as_micros());
    }
    Ok("served".into())
}
