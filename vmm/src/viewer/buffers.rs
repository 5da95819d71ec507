//! Frames as buffers of the compositor: the guest's dma-buf itself, or a copy in shared memory where the compositor
//! cannot import it.

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
    Dispatch, QueueHandle,
    protocol::{wl_buffer::WlBuffer, wl_shm, wl_shm::WlShm, wl_shm_pool::WlShmPool},
};
use wayland_protocols::wp::linux_dmabuf::zv1::client::{
    zwp_linux_buffer_params_v1::{self, ZwpLinuxBufferParamsV1},
    zwp_linux_dmabuf_v1::ZwpLinuxDmabufV1,
};

use super::{
    frame::{Frame, PIXEL},
    mapping::Mapping,
};

/// The longest side of a frame, in pixels.
const MAX_SIDE: u32 = 16384;
/// DRM codes of the formats that every compositor reads from shared memory (`wl_shm.format`).
const XRGB8888: u32 = u32::from_le_bytes(*b"XR24");
const ARGB8888: u32 = u32::from_le_bytes(*b"AR24");
/// Copies of a frame: one is written while the compositor shows the other.
const COPIES: usize = 2;

/// The event handlers that buffers need.
pub trait BufferEvents:
    Dispatch<ZwpLinuxBufferParamsV1, ImportId>
    + Dispatch<WlShmPool, ()>
    + Dispatch<WlBuffer, InUse>
    + 'static
{
}

impl<D> BufferEvents for D where
    D: Dispatch<ZwpLinuxBufferParamsV1, ImportId>
        + Dispatch<WlShmPool, ()>
        + Dispatch<WlBuffer, InUse>
        + 'static
{
}

/// Makes buffers of frames.
pub struct Buffers {
    shm: WlShm,
    dmabuf: Option<ZwpLinuxDmabufV1>,
    /// Formats and layouts that the compositor imports.
    formats: HashSet<(u32, u64)>,
    next_id: u64,
    /// Whether the log has the warning that frames are copied.
    warned: bool,
}

/// A frame in a buffer of the compositor.
pub struct Buffer {
    id: u64,
    frame: Frame,
    access: Access,
}

/// Where the compositor reads a frame.
enum Access {
    /// The compositor has not answered yet.
    Importing,
    /// In the guest's memory.
    Imported(WlBuffer),
    /// In shared memory, to which it is copied.
    Copied(Copied),
    /// Nowhere: the server must send a copy in its place.
    Unreadable,
}

struct Copied {
    source: Mapping,
    target: Mapping,
    buffers: [(WlBuffer, Arc<AtomicBool>); COPIES],
}

/// Whether the compositor still reads a buffer in shared memory.
#[derive(Clone, Debug)]
pub struct InUse(pub Arc<AtomicBool>);

/// The number of the buffer that an import is for.
#[derive(Clone, Copy, Debug)]
pub struct ImportId(pub u64);

impl Buffers {
    /// No buffer yet.
    pub fn new(shm: WlShm, dmabuf: Option<ZwpLinuxDmabufV1>) -> Self {
        Self {
            shm,
            dmabuf,
            formats: HashSet::new(),
            next_id: 1,
            warned: false,
        }
    }

    /// The compositor can import this format and modifier.
    pub fn add_format(&mut self, fourcc: u32, modifier: u64) {
        self.formats.insert((fourcc, modifier));
    }

    /// Has the compositor import a frame, or copies it.
    ///
    /// Fails if the frame is not within its memory or cannot be copied.
    pub fn import(
        &mut self,
        frame: Frame,
        handle: &QueueHandle<impl BufferEvents>,
    ) -> io::Result<Buffer> {
        check(&frame)?;
        let id = self.next_id;
        self.next_id += 1;
        let mut buffer = Buffer {
            id,
            frame,
            access: Access::Importing,
        };
        let frame = &buffer.frame;
        match &self.dmabuf {
            Some(dmabuf) if self.formats.contains(&(frame.fourcc, frame.modifier)) => {
                let params = dmabuf.create_params(handle, ImportId(id));
                let (high, low) = ((frame.modifier >> 32) as u32, frame.modifier as u32);
                params.add(frame.fd.as_fd(), 0, frame.offset, frame.stride, high, low);
                params.create(
                    frame.width as i32,
                    frame.height as i32,
                    frame.fourcc,
                    zwp_linux_buffer_params_v1::Flags::empty(),
                );
            }
            _ => self.fall_back(&mut buffer, handle)?,
        }
        Ok(buffer)
    }

    /// A black frame, for a guest that shows none.
    pub fn blank(
        &self,
        (width, height): (u32, u32),
        handle: &QueueHandle<impl BufferEvents>,
    ) -> io::Result<Buffer> {
        let (width, height) = (width.clamp(1, MAX_SIDE), height.clamp(1, MAX_SIDE));
        let stride = width * PIXEL;
        let mut buffer = Buffer {
            id: 0,
            frame: Frame {
                fd: shared_memory(stride as usize * height as usize)?,
                width,
                height,
                stride,
                offset: 0,
                fourcc: XRGB8888,
                modifier: 0,
                mappable: true,
            },
            access: Access::Importing,
        };
        self.copy(&mut buffer, handle)?;
        Ok(buffer)
    }

    /// Copies a frame from now on. One that this process cannot read becomes [unreadable](Buffer::is_unreadable).
    pub fn fall_back(
        &mut self,
        buffer: &mut Buffer,
        handle: &QueueHandle<impl BufferEvents>,
    ) -> io::Result<()> {
        if !std::mem::replace(&mut self.warned, true) {
            tracing::warn!("the compositor does not import the guest's frames: they are copied");
        }
        if !buffer.frame.mappable {
            buffer.access = Access::Unreadable;
            return Ok(());
        }
        self.copy(buffer, handle)
    }

    fn copy(&self, buffer: &mut Buffer, handle: &QueueHandle<impl BufferEvents>) -> io::Result<()> {
        let frame = &buffer.frame;
        let format = match frame.fourcc {
            XRGB8888 => wl_shm::Format::Xrgb8888,
            ARGB8888 => wl_shm::Format::Argb8888,
            other => wl_shm::Format::try_from(other).map_err(|()| {
                io::Error::other(format!(
                    "the viewer cannot copy frames of format {other:#x}"
                ))
            })?,
        };
        let len = |bytes: Option<u64>| {
            bytes
                .and_then(|bytes| usize::try_from(bytes).ok())
                .ok_or_else(|| io::Error::other("the frame is too large"))
        };
        let source = Mapping::new(&frame.fd, len(frame.end())?, false)?;
        let line = u64::from(frame.width) * u64::from(PIXEL);
        let copy = line * u64::from(frame.height);
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
                frame.width as i32,
                frame.height as i32,
                line as i32,
                format,
                handle,
                InUse(in_use.clone()),
            );
            (wl_buffer, in_use)
        });
        pool.destroy();
        buffer.access = Access::Copied(Copied {
            source,
            target,
            buffers,
        });
        Ok(())
    }
}

/// Checks that a frame is within its memory: its description is not trusted.
fn check(frame: &Frame) -> io::Result<()> {
    let size = seek(&frame.fd, SeekFrom::End(0))?;
    let sane = (1..=MAX_SIDE).contains(&frame.width)
        && (1..=MAX_SIDE).contains(&frame.height)
        && frame.stride / PIXEL >= frame.width
        && frame.end().is_some_and(|end| end <= size);
    if sane {
        Ok(())
    } else {
        Err(io::Error::other(format!(
            "a frame of {}x{} pixels with {} bytes a line does not lie in a dma-buf of {size} bytes",
            frame.width, frame.height, frame.stride
        )))
    }
}

/// A memory file of `len` bytes to share with the compositor.
pub fn shared_memory(len: usize) -> io::Result<OwnedFd> {
    let memory = memfd_create("fanlight-view", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&memory, len as u64)?;
    Ok(memory)
}

impl Buffer {
    /// The number of the buffer.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Whether neither the compositor nor this process can read the frame.
    pub fn is_unreadable(&self) -> bool {
        matches!(self.access, Access::Unreadable)
    }

    /// The whole frame, as damage.
    pub fn whole(&self) -> [i32; 4] {
        [0, 0, self.frame.width as i32, self.frame.height as i32]
    }

    /// The compositor has taken the dma-buf.
    pub fn imported(&mut self, wl_buffer: WlBuffer) {
        self.access = Access::Imported(wl_buffer);
    }

    /// A buffer with the frame as it is now. `None` while there is none, or the compositor still reads all copies.
    pub fn ready(&self) -> io::Result<Option<WlBuffer>> {
        match &self.access {
            Access::Importing | Access::Unreadable => Ok(None),
            Access::Imported(wl_buffer) => Ok(Some(wl_buffer.clone())),
            Access::Copied(copied) => copied.fill(&self.frame),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        match &self.access {
            Access::Importing | Access::Unreadable => {}
            Access::Imported(wl_buffer) => wl_buffer.destroy(),
            Access::Copied(copied) => {
                for (wl_buffer, _) in &copied.buffers {
                    wl_buffer.destroy();
                }
            }
        }
    }
}

impl Copied {
    fn fill(&self, frame: &Frame) -> io::Result<Option<WlBuffer>> {
        let free = self
            .buffers
            .iter()
            .position(|(_, in_use)| !in_use.load(Ordering::Acquire));
        let Some(index) = free else { return Ok(None) };
        let line = frame.width as usize * PIXEL as usize;
        let start = index * line * frame.height as usize;
        cpu_access(&frame.fd, DMA_BUF_SYNC_START);
        let copied = (0..frame.height as usize).try_for_each(|row| {
            let from = frame.offset as usize + row * frame.stride as usize;
            self.target
                .copy(start + row * line, &self.source, from, line)
        });
        cpu_access(&frame.fd, DMA_BUF_SYNC_END);
        copied.ok_or_else(|| io::Error::other("a frame is not within its memory"))?;
        let (wl_buffer, in_use) = &self.buffers[index];
        in_use.store(true, Ordering::Release);
        Ok(Some(wl_buffer.clone()))
    }
}

/// Flags of `DMA_BUF_IOCTL_SYNC` (Linux `include/uapi/linux/dma-buf.h`), for reading.
const DMA_BUF_SYNC_START: u64 = 1;
const DMA_BUF_SYNC_END: u64 = 1 | 1 << 2;

/// Tells the exporter of a dma-buf that the CPU begins or ends to read. A memory file refuses the call and needs none.
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

    fn frame(width: u32, height: u32, stride: u32, offset: u32, bytes: usize) -> Frame {
        Frame {
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
    fn frames_outside_of_their_memory_are_refused() {
        assert!(check(&frame(16, 16, 64, 0, 1024)).is_ok());
        for bad in [
            frame(16, 16, 64, 1, 1024),
            frame(16, 16, 60, 0, 1024),
            frame(0, 16, 64, 0, 1024),
            frame(16, 17, 64, 0, 1024),
            frame(16, u32::MAX, u32::MAX, u32::MAX, 1024),
        ] {
            assert!(check(&bad).is_err(), "{bad:?}");
        }
    }
}
