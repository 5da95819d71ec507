//! Renderer blobs, mapped and unmapped without other commands. Linux's driver sends RESOURCE_MAP_BLOB and
//! RESOURCE_UNMAP_BLOB only when it creates and destroys a blob (Virtio 1.4, 5.7.6.9 and 5.7.6.10).

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
/// The shared memory capability (4.1.4.7).
const SHARED_MEMORY: u8 = 8;
const CONTEXT: u32 = 1;
/// The resource that is mapped and unmapped; the others have the numbers after it.
const GUEST: u32 = 1;

/// The device with a Vulkan context, which creates blobs without a command stream.
pub(super) struct Blobs {
    pub(super) gpu: Gpu,
    pub(super) region: Mmio,
    others: u32,
}

/// Creates a blob of one page.
pub(super) fn create(id: u32) -> Command {
    Command {
        context: CONTEXT,
        type_: CREATE_BLOB,
        body: vec![id, HOST3D, USE_MAPPABLE, 0, 0, 0, PAGE as u32, 0],
    }
}

/// Maps a blob at a page of the region.
pub(super) fn map(id: u32, page: usize) -> Command {
    let offset = (page * PAGE) as u64;
    Command {
        context: 0,
        type_: MAP_BLOB,
        body: vec![id, 0, offset as u32, (offset >> 32) as u32],
    }
}

/// Unmaps a blob.
pub(super) fn unmap(id: u32) -> Command {
    Command {
        context: 0,
        type_: UNMAP_BLOB,
        body: vec![id, 0],
    }
}

/// Frees a blob.
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
        // An empty name, and the context's capset.
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

    /// Maps a blob at the page of its number.
    fn map(&mut self, id: u32) -> Result<()> {
        self.one(&map(id, id as usize))
    }

    /// Writes to a mapped blob, and reads that back.
    fn touch(&self, id: u32) -> Result<()> {
        let at = id as usize * PAGE;
        self.region.write(at, id);
        match self.region.read::<u32>(at) {
            word if word == id => Ok(()),
            word => Err(Failure(format!("blob {id} holds {word:#x}"))),
        }
    }

    /// Keeps `count` other blobs mapped.
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

    /// Maps and unmaps `count` new blobs in turn. Returns the time without their creation.
    fn pairs(&mut self, count: u32) -> Result<Duration> {
        let mut took = Duration::ZERO;
        for _ in 0..count {
            self.one(&create(GUEST))?;
            took += self.pair()?;
            self.one(&unref(GUEST))?;
        }
        Ok(took)
    }

    /// Maps and unmaps one blob `count` times.
    fn again(&mut self, count: u32) -> Result<Duration> {
        let mut took = Duration::ZERO;
        self.one(&create(GUEST))?;
        for _ in 0..count {
            took += self.pair()?;
        }
        self.one(&unref(GUEST))?;
        Ok(took)
    }

    /// Maps a batch of blobs for one notification and unmaps them together, `count` times.
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

    /// Maps and unmaps the blob. The guest writes to it in between, so that a mapped page must be removed.
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

/// Follows the lines of standard input. `others N` keeps N blobs mapped. `pairs N` maps and unmaps N new blobs in turn,
/// `again N` one blob N times, and `batches N` a batch N times. Each line is answered by `agent: did NUMBER: … us.`,
/// counted from 1.
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
