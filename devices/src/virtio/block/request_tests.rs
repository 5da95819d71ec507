//! Requests against a raw image, good and bad.

use std::{io::Write, sync::Arc};

use super::*;
use crate::virtio::{
    VirtioDevice,
    block::Block,
    test_util::{Driver, WRITE},
};

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const STATUS: u64 = 0x30_0000;
const DISK: usize = 1 << 20;

struct Setup {
    driver: Driver,
    block: Block,
    file: tempfile::NamedTempFile,
}

fn setup(readonly: bool) -> Setup {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let content: Vec<u8> = (0..DISK).map(|i| (i / 512) as u8).collect();
    file.write_all(&content).unwrap();
    let image = Arc::new(DiskImage::open(file.path(), readonly, None).unwrap());
    let mut block = Block::new(image, "serial".into(), 1);
    let driver = Driver::new(1);
    block.activate(driver.activation()).unwrap();
    Setup {
        driver,
        block,
        file,
    }
}

impl Setup {
    /// Sends a request with `data` buffers in between; the status byte.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> u8 {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.driver.write(HEADER, &header);
        self.driver.write(STATUS, &[0xaa]);
        let mut chain = vec![(HEADER, 16, 0)];
        chain.extend(data);
        chain.push((STATUS, 1, WRITE));
        self.driver.request(0, &chain);
        self.driver.read(STATUS, 1)[0]
    }

    fn range(&self, sector: u64, count: u32, flags: u32) -> [(u64, u32, u16); 1] {
        self.ranges(&[(sector, count, flags)])
    }

    fn ranges(&self, ranges: &[(u64, u32, u32)]) -> [(u64, u32, u16); 1] {
        let mut bytes = Vec::new();
        for (sector, count, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(count.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.driver.write(DATA, &bytes);
        [(DATA, bytes.len() as u32, 0)]
    }
}

#[test]
fn what_is_written_is_read_and_in_the_file() {
    let mut s = setup(false);
    s.driver.write(DATA, &[0x5a; 1024]);
    assert_eq!(s.request(VIRTIO_BLK_T_OUT, 3, &[(DATA, 1024, 0)]), 0);
    assert_eq!(s.request(VIRTIO_BLK_T_FLUSH, 0, &[]), 0);
    let split = [(DATA + 0x1000, 100, WRITE), (DATA + 0x2000, 924, WRITE)];
    assert_eq!(s.request(VIRTIO_BLK_T_IN, 3, &split), 0);
    assert_eq!(s.driver.read(DATA + 0x1000, 100), [0x5a; 100]);
    assert_eq!(s.driver.read(DATA + 0x2000, 924), [0x5a; 924]);
    let file = std::fs::read(s.file.path()).unwrap();
    assert_eq!(file[3 * 512..5 * 512], [0x5a; 1024]);
    assert_eq!(file[5 * 512], 5);
}

#[test]
fn requests_beyond_the_disk_and_of_odd_length_fail() {
    let mut s = setup(false);
    let sectors = DISK as u64 / 512;
    for (sector, len) in [
        (sectors, 512),
        (sectors - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (0, 511),
    ] {
        assert_eq!(s.request(VIRTIO_BLK_T_IN, sector, &[(DATA, len, WRITE)]), 1);
        assert_eq!(s.request(VIRTIO_BLK_T_OUT, sector, &[(DATA, len, 0)]), 1);
    }
    assert_eq!(s.request(99, 0, &[]), 2);
    assert!(!s.driver.status.needs_reset());
}

#[test]
fn zeroes_and_discards_change_their_ranges_only() {
    let mut s = setup(false);
    for flags in [0, UNMAP] {
        let range = s.range(8, 8, flags);
        assert_eq!(s.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range), 0);
    }
    let range = s.range(32, 8, 0);
    assert_eq!(s.request(VIRTIO_BLK_T_DISCARD, 0, &range), 0);
    let file = std::fs::read(s.file.path()).unwrap();
    assert_eq!(file.len(), DISK);
    assert_eq!(file[8 * 512..16 * 512], [0; 8 * 512]);
    assert_eq!((file[7 * 512], file[16 * 512], file[40 * 512]), (7, 16, 40));
}

#[test]
fn each_range_of_a_request_is_changed() {
    let mut s = setup(false);
    let ranges = s.ranges(&[(8, 8, 0), (24, 8, 0)]);
    assert_eq!(s.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &ranges), 0);
    let file = std::fs::read(s.file.path()).unwrap();
    assert_eq!(file[8 * 512..16 * 512], [0; 8 * 512]);
    assert_eq!(file[24 * 512..32 * 512], [0; 8 * 512]);
    assert_eq!(
        (file[16 * 512], file[23 * 512], file[32 * 512]),
        (16, 23, 32)
    );
}

#[test]
fn bad_ranges_change_nothing() {
    let mut s = setup(false);
    let before = std::fs::read(s.file.path()).unwrap();
    let sectors = DISK as u64 / 512;
    for (sector, count) in [
        (sectors, 1),
        (u64::MAX, 1),
        (0, u32::MAX),
        (1, sectors as u32),
    ] {
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            let range = s.range(sector, count, 0);
            assert_eq!(s.request(kind, 0, &range), 1);
        }
    }
    let range = s.range(0, 1, UNMAP);
    assert_eq!(s.request(VIRTIO_BLK_T_DISCARD, 0, &range), 2);
    assert_eq!(s.request(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 15, 0)]), 1);
    assert_eq!(s.request(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 17 * 16, 0)]), 1);
    assert_eq!(std::fs::read(s.file.path()).unwrap(), before);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut s = setup(true);
    assert_eq!(s.request(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, 0)]), 1);
    let range = s.range(0, 1, 0);
    assert_eq!(s.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range), 1);
    assert_eq!(s.request(VIRTIO_BLK_T_IN, 1, &[(DATA, 512, WRITE)]), 0);
    assert_eq!(s.driver.read(DATA, 512), [1; 512]);
}

#[test]
fn the_serial_number_is_padded() {
    let mut s = setup(false);
    assert_eq!(s.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, WRITE)]), 0);
    assert_eq!(&s.driver.read(DATA, 8), b"serial\0\0");
}

#[test]
fn requests_without_header_or_status_break_the_device() {
    for chain in [
        &[(HEADER, 15, 0), (STATUS, 1, WRITE)][..],
        &[(HEADER, 16, 0)],
        &[(STATUS, 1, WRITE)],
    ] {
        let mut s = setup(false);
        s.driver.submit(0, chain);
        s.driver.wait_broken();
        s.block.reset();
        s.driver.status.clear();
        let fresh = Driver::new(1);
        s.block.activate(fresh.activation()).unwrap();
    }
}
