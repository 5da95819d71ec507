//! A virtio GPU driver in user space, over sysfs. It sends commands that Linux's driver never sends, through the real
//! transport and with real pages (Virtio 1.4, 4.1, 5.7).

mod batch;
mod blobs;
mod thousands;

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    thread,
    time::{Duration, Instant},
};

use rustix::mm::{MapFlags, ProtFlags, mlock, mmap_anonymous};

pub use batch::MOST;
pub use blobs::serve as serve_blobs;
pub use thousands::at_once as blobs_at_once;

use crate::{
    Context, Failure, Result,
    common::{
        pci::{Function, Mmio},
        pixel_formats::{FORMATS, HEIGHT, WIDTH, pixel},
    },
    ensure,
};

/// Vendor and device id.
const IDS: &str = "1af4:1050";
const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;
const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";
/// Far longer than a command takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// The picture has gaps between its lines and before the first.
const STRIDE: u32 = WIDTH * 4 + 64;
const OFFSET: u32 = 128;
const BLOB_PAGES: usize = 3;

/// Locked pages whose physical addresses are known.
struct Pages {
    start: *mut u8,
    physical: Vec<u64>,
}

impl Pages {
    fn new(count: usize) -> Result<Self> {
        Self::mapped(count, MapFlags::empty())
    }

    /// Allocates huge pages of 2 MiB: the pages in each are adjacent.
    fn huge(count: usize) -> Result<Self> {
        let huge = (count * PAGE).div_ceil(HUGE_PAGE);
        fs::write(HUGE_PAGES, huge.to_string()).context("cannot reserve huge pages")?;
        Self::mapped(huge * HUGE_PAGE / PAGE, MapFlags::HUGETLB)
    }

    fn mapped(count: usize, kind: MapFlags) -> Result<Self> {
        let len = count * PAGE;
        // SAFETY: a new mapping at an address that the kernel chooses, which stays for the program's life.
        let start = unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::POPULATE | kind;
            mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )
            .and_then(|start| mlock(start, len).map(|()| start))
        };
        let start: *mut u8 = start.context("cannot lock memory")?.cast();
        let map = File::open("/proc/self/pagemap").context("cannot look up pages")?;
        let physical = (0..count).map(|index| {
            let mut word = [0; 8];
            let page = (start as usize / PAGE + index) as u64;
            map.read_exact_at(&mut word, page * 8)?;
            // Bits 0 to 54 are the page frame number.
            match u64::from_ne_bytes(word) & ((1 << 55) - 1) {
                0 => Err(io::Error::other(
                    "the kernel hides page frames; run this as root",
                )),
                frame => Ok(frame * PAGE as u64),
            }
        });
        let physical = physical
            .collect::<io::Result<_>>()
            .context("cannot look up pages")?;
        Ok(Self { start, physical })
    }

    fn check(&self, at: usize, len: usize) {
        assert!(at + len <= self.physical.len() * PAGE, "{len} at {at}");
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        self.check(at, bytes.len());
        for (index, &byte) in bytes.iter().enumerate() {
            // SAFETY: within the mapping; the access is volatile since the device may read.
            unsafe { self.start.add(at + index).write_volatile(byte) };
        }
    }

    fn read<T: Copy>(&self, at: usize) -> T {
        self.check(at, size_of::<T>());
        // SAFETY: within the mapping, of a type that is valid for any bytes; the device may write.
        unsafe { self.start.add(at).cast::<T>().read_unaligned() }
    }
}

/// Offsets in the first pages.
const TABLE: usize = 0;
const AVAILABLE: usize = 0x800;
const USED: usize = 0xa00;
const REQUEST: usize = PAGE;
const RESPONSE: usize = 2 * PAGE;
const CURSOR_PAGE: usize = 3;
/// Further pages of a request that is longer than a page.
const MORE_PAGES: usize = 4;
const REQUEST_PAGES: usize = 10;
const QUEUE_SIZE: u16 = 128;
const CURSOR_QUEUE_SIZE: u16 = 16;

/// The device with its control queue.
struct Gpu {
    function: Function,
    common: (Mmio, usize),
    notify: (Mmio, usize),
    pages: Pages,
    /// Of the control queue.
    entries: u16,
    submitted: u16,
}

/// Offsets in the common configuration (4.1.4.3).
const DEVICE_FEATURE_SELECT: usize = 0;
const DEVICE_FEATURE: usize = 4;
const DRIVER_FEATURE_SELECT: usize = 8;
const DRIVER_FEATURE: usize = 12;
const DEVICE_STATUS: usize = 20;
const QUEUE_SELECT: usize = 22;
const QUEUE_SIZE_AT: usize = 24;
const QUEUE_ENABLE: usize = 28;
const QUEUE_NOTIFY_OFF: usize = 30;
const QUEUE_ADDRESSES: usize = 32;
/// EDID, RESOURCE_UUID, RESOURCE_BLOB, BLOB_ALIGNMENT, if offered; VERSION_1 is bit 0 of the second word.
const FEATURES: [u32; 2] = [1 << 1 | 1 << 2 | 1 << 3 | 1 << 5, 1];
/// The driver polls the queue.
const NO_INTERRUPT: u16 = 1;
/// Successful responses are from here up to the next multiple.
const OK: u32 = 0x1100;

fn word(function: &Function, at: usize) -> Result<u32> {
    let config = fs::read(function.path().join("config")).context("cannot read registers")?;
    let bytes = config.get(at..at + 4).and_then(|b| b.try_into().ok());
    let bytes = bytes.ok_or_else(|| Failure("no such register".into()))?;
    Ok(u32::from_le_bytes(bytes))
}

/// For the vendor capability of this type: its mapped BAR, the offset that it names in it, and its own offset (4.1.4).
fn capability(function: &Function, type_: u8) -> Result<(Mmio, usize, usize)> {
    let mut at = word(function, 0x34)? as usize & 0xfc;
    while at != 0 {
        let head = word(function, at)?.to_le_bytes();
        if head[0] == 9 && head[3] == type_ {
            let bar = word(function, at + 4)? as usize & 0xff;
            return Ok((function.map(bar)?, word(function, at + 8)? as usize, at));
        }
        at = head[1].into();
    }
    Err(Failure(format!("no capability of type {type_}")))
}

impl Gpu {
    fn open(features: [u32; 2]) -> Result<Self> {
        let function = Function::only(IDS)?;
        function.enable(true)?;
        let (registers, base, _) = capability(&function, 1)?;
        let (notify, notify_base, at) = capability(&function, 2)?;
        let multiplier = word(&function, at + 16)? as usize;
        let pages = Pages::new(MORE_PAGES + REQUEST_PAGES - 1)?;
        let set = |status: u8| registers.write(base + DEVICE_STATUS, status);
        set(0);
        set(1);
        set(3);
        for (select, features) in (0u32..).zip(features) {
            registers.write(base + DEVICE_FEATURE_SELECT, select);
            let offered: u32 = registers.read(base + DEVICE_FEATURE);
            registers.write(base + DRIVER_FEATURE_SELECT, select);
            registers.write(base + DRIVER_FEATURE, features & offered);
        }
        set(11);
        let status: u8 = registers.read(base + DEVICE_STATUS);
        ensure(
            status & 8 != 0,
            "the device refused the features that it offers",
        )?;
        // The control queue comes last: its notification offset is read next.
        let mut entries = 0;
        for (queue, size, page) in [(1u16, CURSOR_QUEUE_SIZE, CURSOR_PAGE), (0, QUEUE_SIZE, 0)] {
            registers.write(base + QUEUE_SELECT, queue);
            // It has the most that the device takes: 64 without 3D in QEMU.
            let most: u16 = registers.read(base + QUEUE_SIZE_AT);
            entries = size.min(most);
            registers.write(base + QUEUE_SIZE_AT, entries);
            for (index, place) in [TABLE, AVAILABLE, USED].into_iter().enumerate() {
                let address = pages.physical[page] + place as u64;
                let at = base + QUEUE_ADDRESSES + index * 8;
                registers.write(at, address as u32);
                registers.write(at + 4, (address >> 32) as u32);
            }
            registers.write(base + QUEUE_ENABLE, 1u16);
        }
        let off: u16 = registers.read(base + QUEUE_NOTIFY_OFF);
        pages.write(AVAILABLE, &NO_INTERRUPT.to_le_bytes());
        set(15);
        Ok(Self {
            function,
            common: (registers, base),
            notify: (notify, notify_base + usize::from(off) * multiplier),
            pages,
            entries,
            submitted: 0,
        })
    }

    /// Sends a command of 32-bit words, which must succeed.
    fn command(&mut self, type_: u32, body: &[u32]) -> Result<()> {
        self.command_of(0, type_, body)
    }

    /// Sends a command for a context.
    fn command_of(&mut self, context: u32, type_: u32, body: &[u32]) -> Result<()> {
        let words = [&[type_, 0, 0, 0, context, 0], body].concat();
        let request: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        ensure(
            request.len() <= REQUEST_PAGES * PAGE,
            "the command is too long",
        )?;
        let pages = &self.pages;
        let mut table = Vec::new();
        for (part, next) in request.chunks(PAGE).zip(1u16..) {
            let page = match next {
                1 => REQUEST / PAGE,
                more => MORE_PAGES + usize::from(more) - 2,
            };
            pages.write(page * PAGE, part);
            table.extend(self.descriptor(page * PAGE, part.len(), 1, next));
        }
        table.extend(self.descriptor(RESPONSE, PAGE, 2, 0));
        self.submit(&table, &[0])
            .context(format!("the device did not do {type_:#x}"))?;
        let answer: u32 = self.pages.read(RESPONSE);
        ensure(
            answer & !0xff == OK,
            format!("{type_:#x} is answered by {answer:#x}"),
        )
    }

    /// A descriptor of `len` bytes of one page (Virtio 1.4, 2.7.5).
    fn descriptor(&self, at: usize, len: usize, flags: u16, next: u16) -> Vec<u8> {
        let address = self.pages.physical[at / PAGE] + (at % PAGE) as u64;
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend((len as u32).to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        bytes
    }

    /// Submits the chains that begin at `heads`, and waits until the device has used them all.
    fn submit(&mut self, table: &[u8], heads: &[u16]) -> Result<()> {
        let pages = &self.pages;
        pages.write(TABLE, table);
        for head in heads {
            let slot = usize::from(self.submitted % self.entries);
            pages.write(AVAILABLE + 4 + slot * 2, &head.to_le_bytes());
            self.submitted = self.submitted.wrapping_add(1);
        }
        pages.write(AVAILABLE + 2, &self.submitted.to_le_bytes());
        self.notify.0.write(self.notify.1, 0u16);
        let start = Instant::now();
        while pages.read::<u16>(USED + 2) != self.submitted {
            ensure(start.elapsed() < PATIENCE, "the device does not answer")?;
            thread::yield_now();
        }
        Ok(())
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.common.0.write(self.common.1 + DEVICE_STATUS, 0u8);
    }
}

const CREATE_2D: u32 = 0x101;
const SET_SCANOUT: u32 = 0x103;
const FLUSH: u32 = 0x104;
const TRANSFER: u32 = 0x105;
const ATTACH: u32 = 0x106;
const DETACH: u32 = 0x107;
const CREATE_BLOB: u32 = 0x10c;
const SET_SCANOUT_BLOB: u32 = 0x10d;

/// Every other page from page `first` on, in reverse: no two are adjacent.
fn scattered(first: usize) -> Vec<usize> {
    (0..BLOB_PAGES).rev().map(|page| first + page * 2).collect()
}

fn entries(pages: &Pages, which: &[usize]) -> Vec<u32> {
    let entry = |&page: &usize| {
        let address = pages.physical[page];
        [address as u32, (address >> 32) as u32, PAGE as u32, 0]
    };
    which.iter().flat_map(entry).collect()
}

/// Draws line by line into pages that form one buffer in the given order.
fn draw(pages: &Pages, which: &[usize], (stride, offset): (u32, u32), round: u8) {
    for y in 0..HEIGHT {
        for x in 0..WIDTH {
            let at = (offset + y * stride + x * 4) as usize;
            pages.write(which[at / PAGE] * PAGE + at % PAGE, &pixel(x, y, round));
        }
    }
}

/// Creates a blob of adjacent pages with an entry for each page, which Linux's driver never does.
pub fn blob_of_neighbours(count: usize) -> Result<String> {
    let mut gpu = Gpu::open(FEATURES)?;
    let memory = Pages::huge(count)?;
    let pages: Vec<usize> = (0..count).collect();
    let size = (count * PAGE) as u32;
    let create = [
        &[1, 1, 2, count as u32, 0, 0, size, 0],
        &entries(&memory, &pages)[..],
    ]
    .concat();
    gpu.command(CREATE_BLOB, &create)?;
    println!("agent: made blob 1");
    let line = io::stdin().read_line(&mut String::new());
    line.context("cannot read a line")?;
    Ok("forgot it".into())
}

/// Shows every format on its own output, each as a blob and as a 2D resource. Then gives the first blob other pages,
/// and then writes to those without a command. `next` gets the name of each step, and waits.
pub fn show(mut next: impl FnMut(&str) -> Result<()>) -> Result<()> {
    let mut gpu = Gpu::open(FEATURES)?;
    let memory = Pages::new(4 * BLOB_PAGES)?;
    let (first, second) = (scattered(0), scattered(1));
    let rectangle = [0, 0, WIDTH, HEIGHT];
    let layout = (STRIDE, OFFSET);
    draw(&memory, &first, layout, 0);
    for (scanout, (_, format)) in (0..).zip(FORMATS) {
        let id = scanout + 1;
        let size = (BLOB_PAGES * PAGE) as u32;
        let mut create = vec![id, 1, 2, BLOB_PAGES as u32, 0, 0, size, 0];
        create.extend(entries(&memory, &first));
        gpu.command(CREATE_BLOB, &create)?;
        let mut show = rectangle.to_vec();
        show.extend([scanout, id, WIDTH, HEIGHT, format, 0]);
        show.extend([STRIDE, 0, 0, 0, OFFSET, 0, 0, 0]);
        gpu.command(SET_SCANOUT_BLOB, &show)?;
    }
    let plain: Vec<usize> = (2 * BLOB_PAGES..4 * BLOB_PAGES).collect();
    draw(&memory, &plain, (WIDTH * 4, 0), 0);
    for (scanout, (_, format)) in (8..).zip(FORMATS) {
        let id = scanout + 1;
        gpu.command(CREATE_2D, &[id, format, WIDTH, HEIGHT])?;
        let mut attach = vec![id, plain.len() as u32];
        attach.extend(entries(&memory, &plain));
        gpu.command(ATTACH, &attach)?;
        let transfer = [&rectangle[..], &[0, 0, id, 0]].concat();
        gpu.command(TRANSFER, &transfer)?;
        gpu.command(SET_SCANOUT, &[&rectangle[..], &[scanout, id]].concat())?;
        gpu.command(FLUSH, &[&rectangle[..], &[id, 0]].concat())?;
    }
    next("shown")?;
    gpu.command(DETACH, &[1, 0])?;
    next("detached")?;
    draw(&memory, &second, layout, 1);
    let attach = [&[1, BLOB_PAGES as u32], &entries(&memory, &second)[..]].concat();
    gpu.command(ATTACH, &attach)?;
    next("moved")?;
    draw(&memory, &second, layout, 2);
    next("written")
}
