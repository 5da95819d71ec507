//! A 4K picture in a BAR that becomes a dma-buf, in turn by the bare ioctl and by the code that the VMM has for it.

use std::{
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use fanlight_devices::{
    dmabuf::{Buffer, Exporter, MemoryEntry, ScatterList},
    memory::{AddressSpace, Backing, BackingKind},
    vfio::{HostDevice, Iommu, sysfs::HostFunction},
};
use fanlight_tests::{
    Context, Failure, Result,
    host_side::bench::{Cell, Table, median},
};

/// Pictures that become dma-bufs of one kind, after a tenth as many to warm up.
const EXPORTS: usize = 200;
/// 3840 by 2160 pixels of four bytes.
const PICTURE: u64 = 3840 * 2160 * 4;
/// The memory of ivshmem, and how long it is.
const BAR: u32 = 2;
const BAR_LEN: u64 = 64 << 20;
/// VFIO's number for configuration space, and COMMAND there with its bits for memory and DMA.
const CONFIG: u32 = 7;
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: [u8; 2] = [0b110, 0];

/// What one kind takes, in seconds.
#[derive(Debug)]
pub struct Export {
    /// Ranges of the BAR.
    pub ranges: usize,
    /// The ioctl as it is.
    pub bare: f64,
    /// Fanlight's way from a blob to its dma-buf.
    pub ours: f64,
    /// A driver's entries looked up, once for each blob.
    pub looking_up: f64,
}

/// Measures one and many ranges of the memory of ivshmem.
pub fn measure(memory: &str) -> Result<Vec<Export>> {
    let function = HostFunction::find(memory.parse().context("an address of sysfs")?);
    let function = function.ok_or_else(|| Failure(format!("{memory} is gone")))?;
    let iommu = Iommu::open(std::slice::from_ref(&function), Some(true), None);
    let device = HostDevice::open(&function, iommu.context("an IOMMU")?, None);
    let device = Arc::new(device.context("a device")?);
    device
        .write(CONFIG, COMMAND, &MEMORY_AND_MASTER)
        .context("cannot write COMMAND")?;
    let start = device.region(BAR).start;
    let map = AddressSpace::new();
    let gpa = 1 << 40;
    let backing = Backing {
        kind: BackingKind::Bar {
            device: 0,
            region: BAR,
            start,
        },
        file: device.file().clone(),
        offset: start,
    };
    map.insert_backed(gpa, BAR_LEN, backing)
        .context("cannot put the BAR into a map")?;
    let exporter = Exporter::open();
    let mut figures = Vec::new();
    for count in [1, 256] {
        let (len, step) = match count {
            1 => (PICTURE, 0),
            // Every other piece of the BAR, which are a few lines more.
            _ => (BAR_LEN / 2 / count, BAR_LEN / count),
        };
        let entries: Vec<_> = (0..count)
            .map(|index| MemoryEntry {
                address: gpa + index * step,
                len,
            })
            .collect();
        let blob = || {
            let size = entries.iter().map(|entry| entry.len).sum();
            let found = ScatterList::resolve(&map, entries.iter().copied(), size);
            Ok::<_, Failure>(Buffer::new(found.context("no memory")?.into_pieces()))
        };
        let pieces = blob()?.pieces().to_vec();
        let ranges = pieces.iter().map(|piece| (piece.offset - start, piece.len));
        let request = request(&ranges.collect::<Vec<_>>());
        let mut times = [Vec::new(), Vec::new(), Vec::new()];
        for round in 0..EXPORTS + EXPORTS / 10 {
            let begun = Instant::now();
            let bare = export(&device, request.clone())?;
            let first = begun.elapsed();
            drop(bare);
            let begun = Instant::now();
            let blob = blob()?;
            let third = begun.elapsed();
            let begun = Instant::now();
            blob.dmabuf(&exporter).context("no dma-buf")?;
            let second = begun.elapsed();
            if round >= EXPORTS / 10 {
                for (times, time) in times.iter_mut().zip([first, second, third]) {
                    times.push(time);
                }
            }
        }
        let [bare, ours, looking_up] = times.map(|times| median(&times, Duration::as_secs_f64));
        let ranges = pieces.len();
        figures.push(Export {
            ranges,
            bare,
            ours,
            looking_up,
        });
    }
    Ok(figures)
}

/// The table of what each round measured.
pub fn table(rounds: &[Vec<Export>]) -> Table {
    let mut table = Table::new(&["Fanlight", "bare ioctl"], [0, 1]);
    let kinds = rounds.first().map_or(0, Vec::len);
    for kind in 0..kinds {
        let of = |figure: fn(&Export) -> f64| {
            let exports = rounds.iter().filter_map(|round| round.get(kind));
            Cell::Figures(exports.map(|export| figure(export) * 1e6).collect())
        };
        let ranges = rounds[0][kind].ranges;
        let bare = || of(|export| export.bare);
        let what = format!("dma-buf of a 4K blob in a BAR, {ranges} ranges");
        table.row(&what, "µs", 1, vec![of(|export| export.ours), bare()]);
        let whole = of(|export| export.ours + export.looking_up);
        let what = "the same, with the look-up of its entries when the guest makes the blob";
        table.row(what, "µs", 1, vec![whole, bare()]);
    }
    table
}

/// `struct vfio_device_feature` with `struct vfio_device_feature_dma_buf` and its ranges.
fn request(ranges: &[(u64, u64)]) -> Vec<u32> {
    const GET_DMA_BUF: u32 = 1 << 16 | 11;
    let open_flags = (libc::O_RDWR | libc::O_CLOEXEC) as u32;
    let header = [0, GET_DMA_BUF, BAR, open_flags, 0, ranges.len() as u32];
    let mut words = header.to_vec();
    for value in ranges.iter().flat_map(|(offset, len)| [offset, len]) {
        words.extend([*value as u32, (*value >> 32) as u32]);
    }
    words[0] = (words.len() * size_of::<u32>()) as u32;
    words
}

/// The ioctl as it is.
fn export(device: &HostDevice, mut request: Vec<u32>) -> Result<OwnedFd> {
    const VFIO_DEVICE_FEATURE: libc::c_ulong = 0x3b75;
    let argument = request.as_mut_ptr();
    // SAFETY: the kernel reads as many bytes as the request says, which is its length.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), VFIO_DEVICE_FEATURE, argument) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context("VFIO_DEVICE_FEATURE");
    }
    // SAFETY: the ioctl returned a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
