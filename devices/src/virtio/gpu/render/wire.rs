//! Protocol between the device and the renderer: packets on a socket, with descriptors. Both ends are one program,
//! so numbers have the byte order of the processor.
//!
//! The body of a request is the structure of the command (`protocol`), as the device has checked it. Ranges of
//! guest RAM follow, as offsets in its memfd.

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut, Read, Seek, Write},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::MemfdFlags,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The longest packet. Capability sets have some thousand bytes at most.
const MAX_PACKET: usize = 16 << 10;
/// More ranges than this travel in a file.
const MAX_RANGES: usize = 900;

/// Kinds of requests, besides the numbers of commands. This one asks for the memory of a blob.
pub const REQUEST_EXPORT: u32 = 1;
/// Copies a rectangle of a resource into the file that comes with the request.
pub const REQUEST_READ_BACK: u32 = 2;
/// Starts the renderer: see [`Start`].
pub const REQUEST_START: u32 = 4;
/// Only a fence.
pub const REQUEST_FENCE: u32 = 3;
/// The memory of a texture as a dma-buf, with its [`TextureLayout`]. Neither if it cannot be exported or is not
/// linear.
pub const REQUEST_EXPORT_TEXTURE: u32 = 5;

/// The renderer is ready: the data are [`CapsetInfo`]s.
pub const REPLY_READY: u32 = 1;
/// There is no renderer: the data are an error message.
pub const REPLY_FAILED: u32 = 2;
/// The reply to a request.
pub const REPLY_DONE: u32 = 3;
/// A fence was passed.
pub const REPLY_FENCE: u32 = 4;

/// The request failed.
pub const FAILED: u32 = 1;
/// The request failed, and no descriptor is left, which may be the cause.
pub const FAILED_NO_FILES: u32 = 2;

/// A range of guest RAM.
#[derive(
    Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout, PartialEq, Eq,
)]
#[repr(C)]
pub struct RamRange {
    /// Offset in the memfd.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A capability set that the renderer has.
#[derive(
    Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout, PartialEq, Eq,
)]
#[repr(C)]
pub struct CapsetInfo {
    /// Its number (Virtio 1.4, 5.7.6.8).
    pub id: u32,
    /// The highest version.
    pub max_version: u32,
    /// The longest content in bytes.
    pub max_size: u32,
}

/// The layout of a texture in its memory.
#[derive(
    Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout, PartialEq, Eq,
)]
#[repr(C)]
pub struct TextureLayout {
    /// DRM's name for its format.
    pub fourcc: u32,
    /// Bytes from one row to the next.
    pub stride: u32,
    /// Where the first row starts.
    pub offset: u32,
}

/// Body of [`REQUEST_READ_BACK`].
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct ReadBack {
    /// The resource.
    pub resource: u32,
    /// Bytes from one row to the next in the file.
    pub stride: u32,
    /// Left edge.
    pub x: u32,
    /// Upper edge.
    pub y: u32,
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Where in the file the first pixel goes.
    pub offset: u64,
    /// Length of the file.
    pub size: u64,
}

/// A position in the order of fences.
#[derive(
    Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout, PartialEq, Eq,
)]
#[repr(C)]
pub struct FencePosition {
    /// Whether `context` and `ring` count. If not, it is in the order of the device.
    pub of_ring: u32,
    /// The context.
    pub context: u32,
    /// The ring of that context.
    pub ring: u32,
    /// A number that grows; 0 means no fence.
    pub number: u32,
}

/// The header of a request.
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct RequestHeader {
    /// A command's number, or one of the above.
    pub what: u32,
    /// `ctx_id` of the command.
    pub context: u32,
    /// The fence to report once everything before it is done.
    pub fence: FencePosition,
    /// Length of the body.
    pub body: u32,
    /// Number of ranges that follow.
    pub ranges: u32,
    /// Whether they are in the file that comes with the request.
    pub in_file: u32,
    /// Whether it gets no reply. It has no fence then.
    pub unanswered: u32,
}

/// The first request: which APIs the renderer is to offer. The memfd of guest RAM comes with it.
#[derive(
    Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout, PartialEq, Eq,
)]
#[repr(C)]
pub struct Start {
    /// OpenGL.
    pub virgl: u32,
    /// Vulkan.
    pub venus: u32,
}

/// A request to the renderer.
#[derive(Debug, Default)]
pub struct Request {
    /// Its header; lengths are filled in when it is sent.
    pub head: RequestHeader,
    /// The command.
    pub body: Vec<u8>,
    /// Guest RAM.
    pub ranges: Vec<RamRange>,
    /// A file for the pixels.
    pub file: Option<File>,
}

impl Request {
    /// A request with a command as its body.
    pub fn new(what: u32, context: u32, body: &(impl IntoBytes + Immutable)) -> Self {
        Self {
            head: RequestHeader {
                what,
                context,
                ..Default::default()
            },
            body: body.as_bytes().into(),
            ..Default::default()
        }
    }

    /// Sends it as one packet.
    pub fn send(&self, socket: impl AsFd) -> io::Result<()> {
        let in_file = self.ranges.len() > MAX_RANGES;
        let head = RequestHeader {
            body: self.body.len() as u32,
            ranges: self.ranges.len() as u32,
            in_file: in_file.into(),
            ..self.head
        };
        let ranges = self.ranges.as_bytes();
        let mut list = None;
        if in_file {
            let mut file = File::from(rustix::fs::memfd_create("ranges", MemfdFlags::CLOEXEC)?);
            file.write_all(ranges)?;
            list = Some(file);
        }
        let behind = if in_file { &[] } else { ranges };
        let file = list.as_ref().or(self.file.as_ref());
        let packet = [head.as_bytes(), &self.body, behind].concat();
        send(socket, &packet, file.map(AsFd::as_fd))
    }

    /// Receives one packet; `None` once the other end is closed.
    pub fn receive(socket: impl AsFd, flags: RecvFlags) -> io::Result<Option<Self>> {
        let Some(Packet {
            bytes: packet,
            mut file,
            ..
        }) = receive(socket, flags)?
        else {
            return Ok(None);
        };
        let bad = || io::Error::from(io::ErrorKind::InvalidData);
        let (head, rest) = RequestHeader::read_from_prefix(&packet).map_err(|_| bad())?;
        let (body, rest) = rest.split_at_checked(head.body as usize).ok_or_else(bad)?;
        let mut ranges = vec![RamRange::default(); head.ranges as usize];
        if head.in_file != 0 {
            let mut list = file.take().ok_or_else(bad)?;
            list.rewind()?;
            list.read_exact(ranges.as_mut_bytes())?;
        } else if rest.len() == ranges.as_bytes().len() {
            ranges.as_mut_bytes().copy_from_slice(rest);
        } else {
            return Err(bad());
        }
        Ok(Some(Self {
            head,
            body: body.into(),
            ranges,
            file,
        }))
    }
}

/// The header of a reply.
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct ReplyHeader {
    /// One of the above.
    pub what: u32,
    /// Whether the request failed, and why.
    pub failed: u32,
    /// Which fence was passed.
    pub fence: FencePosition,
    /// A number that belongs to the reply.
    pub value: u32,
    pad: u32,
}

/// A reply of the renderer, or an event.
#[derive(Debug, Default)]
pub struct Reply {
    /// Its header.
    pub head: ReplyHeader,
    /// Data of the reply.
    pub data: Vec<u8>,
    /// Memory of a blob.
    pub file: Option<File>,
    /// A file came with it, and this process may not open more.
    pub lost_file: bool,
}

impl Reply {
    /// A reply of a kind, without data.
    pub fn of(what: u32) -> Self {
        let head = ReplyHeader {
            what,
            ..Default::default()
        };
        Self {
            head,
            ..Default::default()
        }
    }

    /// Sends it as one packet.
    pub fn send(&self, socket: impl AsFd) -> io::Result<()> {
        let packet = [self.head.as_bytes(), &self.data].concat();
        send(socket, &packet, self.file.as_ref().map(AsFd::as_fd))
    }

    /// Receives one packet; `None` once the other end is closed.
    pub fn receive(socket: impl AsFd, flags: RecvFlags) -> io::Result<Option<Self>> {
        let Some(packet) = receive(socket, flags)? else {
            return Ok(None);
        };
        let (head, data) = ReplyHeader::read_from_prefix(&packet.bytes)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        Ok(Some(Self {
            head,
            data: data.into(),
            file: packet.file,
            lost_file: packet.lost_file,
        }))
    }
}

fn send(socket: impl AsFd, packet: &[u8], file: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files: Vec<_> = file.into_iter().collect();
    if !files.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&files));
    }
    loop {
        match sendmsg(
            &socket,
            &[IoSlice::new(packet)],
            &mut control,
            SendFlags::NOSIGNAL,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            result => return result.map(drop).map_err(Into::into),
        }
    }
}

/// One packet, as received.
struct Packet {
    bytes: Vec<u8>,
    file: Option<File>,
    /// A descriptor was dropped because this process may not open more.
    lost_file: bool,
}

fn receive(socket: impl AsFd, flags: RecvFlags) -> io::Result<Option<Packet>> {
    let mut packet = vec![0; MAX_PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        match recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut packet)],
            &mut control,
            flags,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    let files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let file = files.flatten().next().map(|fd: OwnedFd| File::from(fd));
    packet.truncate(received.bytes);
    Ok((received.bytes > 0).then_some(Packet {
        bytes: packet,
        file,
        lost_file: received.flags.contains(ReturnFlags::CTRUNC),
    }))
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    #[test]
    fn calls_arrive_as_they_were_sent() {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        for count in [0, 2, MAX_RANGES + 1] {
            let mut call = Request::new(7, 3, &[1_u8, 2, 3]);
            call.ranges = (0..count as u64)
                .map(|offset| RamRange { offset, len: 9 })
                .collect();
            call.send(&ours).unwrap();
            let back = Request::receive(&theirs, RecvFlags::empty())
                .unwrap()
                .unwrap();
            assert_eq!((back.head.what, back.head.context), (7, 3));
            assert_eq!(back.body, [1, 2, 3]);
            assert_eq!(back.ranges, call.ranges);
        }
        send(&ours, &[1; 10], None).unwrap();
        assert!(Request::receive(&theirs, RecvFlags::empty()).is_err());
        drop(ours);
        let end = Request::receive(&theirs, RecvFlags::empty()).unwrap();
        assert!(end.is_none());
    }
}
