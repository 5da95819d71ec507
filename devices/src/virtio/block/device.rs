//! The block device: its configuration, its queues and their threads.

use std::{
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
};

use super::{
    disk::{DiskImage, SECTOR_SIZE},
    request::{self, MAX_RANGE_SECTORS, MAX_RANGES},
};
use crate::virtio::{
    ActivateError, Activation, DeviceQueue, QueueError, QueueHandler, VirtioDevice, Worker,
    read_bytes,
};
use zerocopy::{Immutable, IntoBytes, little_endian};

const VIRTIO_BLK_F_SEG_MAX: u64 = 1 << 2;
const VIRTIO_BLK_F_RO: u64 = 1 << 5;
const VIRTIO_BLK_F_BLK_SIZE: u64 = 1 << 6;
const VIRTIO_BLK_F_FLUSH: u64 = 1 << 9;
const VIRTIO_BLK_F_MQ: u64 = 1 << 12;
const VIRTIO_BLK_F_DISCARD: u64 = 1 << 13;
const VIRTIO_BLK_F_WRITE_ZEROES: u64 = 1 << 14;

/// Requests in flight on a queue.
const QUEUE_SIZE: u16 = 256;
/// More queues than about this many vCPUs bring no gain.
const MAX_QUEUES: u16 = 16;
/// Data buffers of one request: what a queue holds, less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Alignment that avoids updates of image metadata.
const DISCARD_ALIGNMENT: u32 = (64 << 10) / SECTOR_SIZE as u32;

/// Device configuration (`struct virtio_blk_config`).
#[derive(Clone, Debug, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    capacity: little_endian::U64,
    size_max: little_endian::U32,
    seg_max: little_endian::U32,
    geometry: [u8; 4],
    blk_size: little_endian::U32,
    topology: [u8; 8],
    writeback: u8,
    unused0: u8,
    num_queues: little_endian::U16,
    max_discard_sectors: little_endian::U32,
    max_discard_seg: little_endian::U32,
    discard_sector_alignment: little_endian::U32,
    max_write_zeroes_sectors: little_endian::U32,
    max_write_zeroes_seg: little_endian::U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

/// The block device.
#[derive(Debug)]
pub struct Block {
    image: Arc<DiskImage>,
    serial: String,
    queue_sizes: Vec<u16>,
    config: Config,
    workers: Vec<Worker>,
}

impl Block {
    /// A disk of `image`. `serial` is the identity that the driver reads; `queues` is how many it could use.
    pub fn new(image: Arc<DiskImage>, serial: String, queues: u32) -> Self {
        let queues = (queues.clamp(1, u32::from(MAX_QUEUES))) as u16;
        let config = Config {
            capacity: (image.size() / SECTOR_SIZE).into(),
            size_max: 0.into(),
            seg_max: SEG_MAX.into(),
            geometry: [0; 4],
            blk_size: (SECTOR_SIZE as u32).into(),
            topology: [0; 8],
            writeback: 1,
            unused0: 0,
            num_queues: queues.into(),
            max_discard_sectors: MAX_RANGE_SECTORS.into(),
            max_discard_seg: MAX_RANGES.into(),
            discard_sector_alignment: DISCARD_ALIGNMENT.into(),
            max_write_zeroes_sectors: MAX_RANGE_SECTORS.into(),
            max_write_zeroes_seg: MAX_RANGES.into(),
            write_zeroes_may_unmap: 1,
            unused1: [0; 3],
        };
        Self {
            image,
            serial,
            queue_sizes: vec![QUEUE_SIZE; usize::from(queues)],
            config,
            workers: Vec::new(),
        }
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        2
    }

    fn name(&self) -> &'static str {
        "block"
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let access = if self.image.is_readonly() {
            VIRTIO_BLK_F_RO
        } else {
            VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES
        };
        access | VIRTIO_BLK_F_SEG_MAX | VIRTIO_BLK_F_BLK_SIZE | VIRTIO_BLK_F_FLUSH | VIRTIO_BLK_F_MQ
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // The disk may have grown.
        let config = Config {
            capacity: (self.image.size() / SECTOR_SIZE).into(),
            ..self.config.clone()
        };
        read_bytes(config.as_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let mut queues = vec![activation.take_queue(0)?];
        // A driver with fewer processors than there are queues leaves the rest disabled.
        queues.extend(
            (1..self.queue_sizes.len() as u16)
                .filter_map(|index| activation.take_optional_queue(index)),
        );
        for queue in queues {
            let name = format!("block-{}", queue.index());
            let handler = Handler {
                queue,
                image: self.image.clone(),
                serial: self.serial.clone(),
            };
            let worker = Worker::spawn(name, activation.status.clone(), handler)?;
            self.workers.push(worker);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.clear();
    }
}

struct Handler {
    queue: DeviceQueue,
    image: Arc<DiskImage>,
    serial: String,
}

impl QueueHandler for Handler {
    fn sources(&self) -> Vec<RawFd> {
        vec![self.queue.kick().as_raw_fd()]
    }

    fn ready(&mut self, _source: usize) -> Result<(), QueueError> {
        self.queue.clear_kick();
        let Self {
            queue,
            image,
            serial,
        } = self;
        let index = queue.index();
        queue.drain(|mem, request| request::handle(mem, index, request, image, serial))
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn configuration_is_laid_out_as_the_specification_says() {
        assert_eq!(offset_of!(Config, blk_size), 20);
        assert_eq!(offset_of!(Config, writeback), 32);
        assert_eq!(offset_of!(Config, max_discard_sectors), 36);
        assert_eq!(offset_of!(Config, write_zeroes_may_unmap), 56);
        assert_eq!(size_of::<Config>(), 60);
    }
}
