//! Pictures as buffers of the compositor: the guest's dma-buf itself, or where that cannot be, a copy in
//! shared memory.

use std::{
    collections::HashSet,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::{
    fs::{MemfdFlags, SeekFrom, memfd_create, seek},
    ioctl::{Setter, ioctl, opcode},
};
use wayland_client::{
    QueueHandle,
    protocol::{wl_buffer::WlBuffer, wl_shm, wl_shm::WlShm},
};
use wayland_protocols::wp::linux_dmabuf::zv1::client::{
    zwp_linux_buffer_params_v1, zwp_linux_dmabuf_v1::ZwpLinuxDmabufV1,
};

use super::{
    mapping::Mapping,
    picture::{PIXEL, Picture},
    window::{State, WindowEvent},
};

/// The longest side of a picture.
const MAX_SIDE: u32 = 16384;
/// DRM's codes of the formats that every compositor takes from shared memory.
const XRGB8888: u32 = u32::from_le_bytes(*b"XR24");
const ARGB8888: u32 = u32::from_le_bytes(*b"AR24");
/// Copies, so that one can be made while the compositor shows the other.
const COPIES: usize = 2;

/// Makes buffers.
pub struct Buffers {
    shm: WlShm,
    dmabuf: Option<ZwpLinuxDmabufV1>,
    /// Formats and layouts that the compositor imports.
    formats: HashSet<(u32, u64)>,
    next_id: u64,
    /// Whether the user knows that pictures are copied.
    told: bool,
}

/// A picture that the compositor shows.
pub struct Buffer {
    id: u64,
    picture: Picture,
    way: Way,
}

enum Way {
    /// The compositor has not answered.
    Importing,
    /// The compositor reads the guest's memory.
    Imported(WlBuffer),
    Copied(Copied),
    /// Nobody can read it: there will be another picture in its place.
    Unreadable,
}

struct Copied {
    source: Mapping,
    target: Mapping,
    buffers: [(WlBuffer, Arc<AtomicBool>); COPIES],
}

/// Of a buffer in shared memory: whether the compositor still reads it.
#[derive(Clone, Debug)]
pub(super) struct InUse(pub Arc<AtomicBool>);

/// Of an import: the buffer that it is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct ImportOf(pub u64);

impl Buffers {
    /// None yet.
    pub fn new(shm: WlShm, dmabuf: Option<ZwpLinuxDmabufV1>) -> Self {
        Self {
            shm,
            dmabuf,
            formats: HashSet::new(),
            next_id: 1,
            told: false,
        }
    }

    /// The compositor says that it can import this.
    pub fn add_format(&mut self, fourcc: u32, modifier: u64) {
        self.formats.insert((fourcc, modifier));
    }

    /// Hands a picture to the compositor.
    pub(super) fn import(
        &mut self,
        picture: Picture,
        handle: &QueueHandle<State>,
    ) -> io::Result<Buffer> {
        check(&picture)?;
        let id = self.next_id;
        self.next_id += 1;
        let mut buffer = Buffer {
            id,
            picture,
            way: Way::Importing,
        };
        let picture = &buffer.picture;
        match &self.dmabuf {
            Some(dmabuf) if self.formats.contains(&(picture.fourcc, picture.modifier)) => {
                let params = dmabuf.create_params(handle, ImportOf(id));
                let (high, low) = ((picture.modifier >> 32) as u32, picture.modifier as u32);
                params.add(
                    picture.fd.as_fd(),
                    0,
                    picture.offset,
                    picture.stride,
                    high,
                    low,
                );
                params.create(
                    picture.width as i32,
                    picture.height as i32,
                    picture.fourcc,
                    zwp_linux_buffer_params_v1::Flags::empty(),
                );
            }
            _ => self.fall_back(&mut buffer, handle)?,
        }
        Ok(buffer)
    }

    /// A black picture, for when the guest shows none.
    pub(super) fn blank(
        &self,
        (width, height): (u32, u32),
        handle: &QueueHandle<State>,
    ) -> io::Result<Buffer> {
        let (width, height) = (width.clamp(1, MAX_SIDE), height.clamp(1, MAX_SIDE));
        let stride = width * PIXEL;
        let mut buffer = Buffer {
            id: 0,
            picture: Picture {
                fd: shared_memory(stride as usize * height as usize)?,
                width,
                height,
                stride,
                offset: 0,
                fourcc: XRGB8888,
                modifier: 0,
                mappable: true,
            },
            way: Way::Importing,
        };
        self.copy(&mut buffer, handle)?;
        Ok(buffer)
    }

    /// Has a picture copied from now on, by whoever can.
    pub(super) fn fall_back(
        &mut self,
        buffer: &mut Buffer,
        handle: &QueueHandle<State>,
    ) -> io::Result<()> {
        if !std::mem::replace(&mut self.told, true) {
            tracing::warn!("the compositor does not import the guest's pictures: they are copied");
        }
        if !buffer.picture.mappable {
            buffer.way = Way::Unreadable;
            return Ok(());
        }
        self.copy(buffer, handle)
    }

    fn copy(&self, buffer: &mut Buffer, handle: &QueueHandle<State>) -> io::Result<()> {
        let picture = &buffer.picture;
        let format = match picture.fourcc {
            XRGB8888 => wl_shm::Format::Xrgb8888,
            ARGB8888 => wl_shm::Format::Argb8888,
            other => wl_shm::Format::try_from(other).map_err(|()| {
                io::Error::other(format!("no compositor takes pictures of format {other:#x}"))
            })?,
        };
        let len = |bytes: Option<u64>| {
            bytes
                .and_then(|bytes| usize::try_from(bytes).ok())
                .ok_or_else(|| io::Error::other("the picture is too large"))
        };
        let source = Mapping::new(&picture.fd, len(picture.end())?, false)?;
        let line = u64::from(picture.width) * u64::from(PIXEL);
        let copy = line * u64::from(picture.height);
        let total = len(copy
            .checked_mul(COPIES as u64)
            .filter(|&t| t <= i32::MAX as u64))?;
        let memory = shared_memory(total)?;
        let target = Mapping::new(&memory, total, true)?;
        let pool = self
            .shm
            .create_pool(memory.as_fd(), total as i32, handle, ());
        let buffers = std::array::from_fn(|index| {
            let in_use = Arc::new(AtomicBool::new(false));
            let wl_buffer = pool.create_buffer(
                (index as u64 * copy) as i32,
                picture.width as i32,
                picture.height as i32,
                line as i32,
                format,
                handle,
                InUse(in_use.clone()),
            );
            (wl_buffer, in_use)
        });
        pool.destroy();
        buffer.way = Way::Copied(Copied {
            source,
            target,
            buffers,
        });
        Ok(())
    }
}

/// A picture must lie within its dma-buf, whoever describes it.
fn check(picture: &Picture) -> io::Result<()> {
    let size = seek(&picture.fd, SeekFrom::End(0))?;
    let sane = (1..=MAX_SIDE).contains(&picture.width)
        && (1..=MAX_SIDE).contains(&picture.height)
        && picture.stride / PIXEL >= picture.width
        && picture.end().is_some_and(|end| end <= size);
    if sane {
        Ok(())
    } else {
        Err(io::Error::other(format!(
            "a picture of {}x{} pixels with {} bytes a line does not lie in a dma-buf of {size} bytes",
            picture.width, picture.height, picture.stride
        )))
    }
}

/// Memory to share with the compositor.
pub fn shared_memory(len: usize) -> io::Result<OwnedFd> {
    let memory = memfd_create("fanlight-view", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&memory, len as u64)?;
    Ok(memory)
}

impl Buffer {
    /// Tells buffers apart.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// What to tell if only who made the picture can copy it.
    pub fn unreadable(&self) -> Option<WindowEvent> {
        matches!(self.way, Way::Unreadable).then_some(WindowEvent::Unreadable)
    }

    /// All of it, as damage.
    pub fn whole(&self) -> [i32; 4] {
        [0, 0, self.picture.width as i32, self.picture.height as i32]
    }

    /// The compositor has taken the dma-buf.
    pub fn imported(&mut self, wl_buffer: WlBuffer) {
        self.way = Way::Imported(wl_buffer);
    }

    /// A buffer with the picture as it is now. `None`: not yet.
    pub fn ready(&self) -> io::Result<Option<WlBuffer>> {
        match &self.way {
            Way::Importing | Way::Unreadable => Ok(None),
            Way::Imported(wl_buffer) => Ok(Some(wl_buffer.clone())),
            Way::Copied(copied) => copied.fill(&self.picture),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        match &self.way {
            Way::Importing | Way::Unreadable => {}
            Way::Imported(wl_buffer) => wl_buffer.destroy(),
            Way::Copied(copied) => {
                for (wl_buffer, _) in &copied.buffers {
                    wl_buffer.destroy();
                }
            }
        }
    }
}

impl Copied {
    fn fill(&self, picture: &Picture) -> io::Result<Option<WlBuffer>> {
        let free = self
            .buffers
            .iter()
            .position(|(_, in_use)| !in_use.load(Ordering::Acquire));
        let Some(index) = free else { return Ok(None) };
        let line = picture.width as usize * PIXEL as usize;
        let start = index * line * picture.height as usize;
        cpu_access(&picture.fd, DMA_BUF_SYNC_START);
        let copied = (0..picture.height as usize).try_for_each(|row| {
            let from = picture.offset as usize + row * picture.stride as usize;
            self.target
                .copy(start + row * line, &self.source, from, line)
        });
        cpu_access(&picture.fd, DMA_BUF_SYNC_END);
        copied.ok_or_else(|| io::Error::other("a picture does not lie in its memory"))?;
        let (wl_buffer, in_use) = &self.buffers[index];
        in_use.store(true, Ordering::Release);
        Ok(Some(wl_buffer.clone()))
    }
}

/// Flags of `DMA_BUF_IOCTL_SYNC` (Linux `include/uapi/linux/dma-buf.h`), for reading.
const DMA_BUF_SYNC_START: u64 = 1;
const DMA_BUF_SYNC_END: u64 = 1 | 1 << 2;

/// Tells a dma-buf's exporter that the CPU starts, or has ended, reading. Other descriptors have no such
/// call, and need none.
fn cpu_access(fd: &OwnedFd, flags: u64) {
    // SAFETY: the ioctl reads one 64-bit number.
    let _ = unsafe {
        ioctl(
            fd,
            Setter::<{ opcode::write::<u64>(b'b', 0) }, u64>::new(flags),
        )
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: u32, height: u32, stride: u32, offset: u32, bytes: usize) -> Picture {
        Picture {
            fd: shared_memory(bytes).unwrap(),
            width,
            height,
            stride,
            offset,
            fourcc: XRGB8888,
            modifier: 0,
            mappable: true,
        }
    }

    #[test]
    fn pictures_outside_of_their_memory_are_refused() {
        assert!(check(&picture(16, 16, 64, 0, 1024)).is_ok());
        for bad in [
            picture(16, 16, 64, 1, 1024),
            picture(16, 16, 60, 0, 1024),
            picture(0, 16, 64, 0, 1024),
            picture(16, 17, 64, 0, 1024),
            picture(16, u32::MAX, u32::MAX, u32::MAX, 1024),
        ] {
            assert!(check(&bad).is_err(), "{bad:?}");
        }
    }
}
