//! Disks keep data that the guest was told is written, even if the process is killed.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use fanlight_tests::{
    Context, Failure, Result, ensure,
    host_side::{
        guest::{Assets, make_image, qemu_img},
        test_case::TestCase,
    },
    nested_host::L1Device,
    value,
};
use rustix::process::Signal;
use serde_json::Value;

pub const TESTS: &[TestCase] = &[
    TestCase::new("disk::raw_survives_sigkill", |assets| {
        survives(assets, "raw")
    }),
    TestCase::new("disk::qcow2_survives_sigkill", |assets| {
        survives(assets, "qcow2")
    }),
    TestCase::new("disk::a_flush_reaches_the_hosts_disk", flush).devices(&[L1Device::VirtioDisk]),
    TestCase::new("disk::qcow2_discards", |assets| discards(assets, "qcow2")),
    TestCase::new("disk::raw_discards", |assets| discards(assets, "raw")),
    TestCase::new("disk::raw_writes_zeroes", |assets| {
        write_zeroes(assets, "raw")
    }),
    TestCase::new("disk::qcow2_writes_zeroes", |assets| {
        write_zeroes(assets, "qcow2")
    }),
    TestCase::new("disk::read_only_and_serial", read_only),
    TestCase::new("disk::queues_and_a_file_system", file_system),
];

/// Writes 24 MiB of random bytes at 8 MiB and prints their checksum.
const WRITE: &str = "dd if=/dev/urandom of=/tmp/x bs=1M count=24 2>/dev/null
    dd if=/tmp/x of=/dev/vda bs=1M seek=8 conv=fsync 2>/dev/null && sync
    echo sum: $(md5sum < /tmp/x)
    echo written; sleep 1000";
/// Bytes of a cluster of qcow2, where qemu-img is told no other size.
const CLUSTER: u64 = 64 << 10;
const READ: &str = "echo sum: $(dd if=/dev/vda bs=1M skip=8 count=24 2>/dev/null | md5sum)";

fn survives(assets: &Assets, format: &str) -> Result<()> {
    let guest = assets.guest(WRITE);
    let dir = tempfile::tempdir().map_err(|e| fanlight_tests::Failure(e.to_string()))?;
    let image = dir.path().join("disk");
    make_image(assets, &image, format, "64M")?;
    let disk = format!("path={},format={format}", image.display());
    let mut guest = guest.option("--disk", &disk).start()?;
    guest.wait_for("written")?;
    let written = guest.transcript();
    guest.signal(Signal::KILL)?;
    drop(guest);
    if format == "qcow2" {
        qemu_img(assets, &["check", "-q", "-f", format], &image, &[])?;
    }
    let read = assets.guest(READ).option("--disk", &disk).run()?;
    ensure(
        value(&read, "sum:")? == value(&written, "sum:")?,
        format!("{written}\n{read}"),
    )
}

/// What the guest writes stays in the page cache of the host until the guest flushes its disk: then the host's disk has
/// written it, and has flushed its own cache.
fn flush(assets: &Assets) -> Result<()> {
    const DISK: &str = "/dev/vda";
    // The host writes nothing back by itself (Linux Documentation/admin-guide/sysctl/vm.rst).
    let interval = "/proc/sys/vm/dirty_writeback_centisecs";
    fs::write(interval, "0").context("cannot switch periodic writeback off")?;
    let before = Written::by(DISK)?;
    let mut guest = assets
        .guest(
            "dd if=/dev/urandom of=/dev/vda bs=1M count=1 oflag=direct conv=notrunc 2>/dev/null
             echo written; read -r line
             dd if=/dev/null of=/dev/vda conv=fsync,notrunc 2>/dev/null && echo synced; read -r line",
        )
        .option("--disk", format!("path={DISK}"))
        .start()?;
    guest.wait_for("written")?;
    let cached = Written::by(DISK)?;
    ensure(cached == before, format!("{cached:?} after {before:?}"))?;
    guest.send("\n")?;
    guest.wait_for("synced")?;
    let synced = Written::by(DISK)?;
    ensure(
        synced.sectors >= before.sectors + (1 << 20) / 512 && synced.flushes > before.flushes,
        format!("{synced:?} after {before:?}"),
    )?;
    guest.send("\n")?;
    guest.expect_exit(0)
}

/// What the host's kernel had a disk do (Linux `Documentation/block/stat.rst`).
#[derive(Debug, PartialEq, Eq)]
struct Written {
    sectors: u64,
    flushes: u64,
}

impl Written {
    fn by(disk: &str) -> Result<Self> {
        let name = Path::new(disk).file_name().unwrap_or_default();
        let file = Path::new("/sys/block").join(name).join("stat");
        let text = fs::read_to_string(file).context("cannot read a disk's statistics")?;
        let numbers: Vec<_> = text.split_whitespace().collect();
        let number = |field: usize| {
            let number = numbers.get(field).and_then(|number| number.parse().ok());
            number.ok_or_else(|| Failure(format!("no field {field} in {text:?}")))
        };
        Ok(Self {
            sectors: number(6)?,
            flushes: number(15)?,
        })
    }
}

/// Writes 16 MiB and discards 4 MiB of them, which the image then no longer has.
fn discards(assets: &Assets, format: &str) -> Result<()> {
    let guest = assets.guest(
        "dd if=/dev/urandom of=/dev/vda bs=1M count=16 conv=fsync 2>/dev/null
         before=$(dd if=/dev/vda bs=1M skip=8 count=8 2>/dev/null | md5sum)
         blkdiscard -o 4194304 -l 4194304 /dev/vda && echo discarded; sync
         echo 3 > /proc/sys/vm/drop_caches
         [ \"$before\" = \"$(dd if=/dev/vda bs=1M skip=8 count=8 2>/dev/null | md5sum)\" ] && echo same",
    );
    let image = guest.path("disk");
    make_image(assets, &image, format, "64M")?;
    let mut guest = guest
        .option(
            "--disk",
            format!("path={},format={format}", image.display()),
        )
        .start()?;
    guest.expect_exit(0)?;
    let said = guest.transcript();
    ensure(said.contains("discarded") && said.contains("same"), &said)?;
    let kept = if format == "qcow2" {
        let check = qemu_img(
            assets,
            &["check", "--output=json", "-f", format],
            &image,
            &[],
        )?;
        let check: Value = serde_json::from_str(&check).context("not JSON")?;
        let clusters = check["allocated-clusters"].as_u64();
        clusters.ok_or_else(|| Failure(format!("no count in {check}")))? * CLUSTER
    } else {
        let taken = fs::metadata(&image).context("the image is gone")?;
        taken.blocks() * 512
    };
    ensure(
        kept <= 12 << 20,
        format!("{kept} bytes of the image are still allocated"),
    )
}

fn write_zeroes(assets: &Assets, format: &str) -> Result<()> {
    let guest = assets.guest(
        "echo limit: $(cat /sys/block/vda/queue/write_zeroes_max_bytes)
         dd if=/dev/urandom of=/tmp/x bs=1M count=16 2>/dev/null
         dd if=/tmp/x of=/dev/vda bs=1M conv=fsync 2>/dev/null
         guest-agent zero /dev/vda 4194304 1048576; echo 3 > /proc/sys/vm/drop_caches
         dd if=/dev/zero of=/tmp/x bs=1M seek=4 count=1 conv=notrunc 2>/dev/null
         dd if=/dev/vda bs=1M count=16 2>/dev/null | cmp - /tmp/x && echo same",
    );
    let image = guest.path("disk");
    make_image(assets, &image, format, "64M")?;
    let disk = format!("path={},format={format}", image.display());
    let said = guest.option("--disk", disk).run()?;
    // Without the feature the guest would write zeroes itself.
    ensure(value(&said, "limit:")? != "0", &said)?;
    ensure(said.contains("zeroed") && said.contains("same"), &said)
}

fn read_only(assets: &Assets) -> Result<()> {
    let guest = assets.guest(
        "echo ro: $(cat /sys/block/vda/ro); echo serial: $(cat /sys/block/vda/serial)
         dd if=/tmp/x of=/dev/vda 2>&1 | grep -q . && echo refused",
    );
    let image = guest.path("disk");
    make_image(assets, &image, "raw", "16M")?;
    let said = guest
        .option(
            "--disk",
            format!("path={},readonly=on,serial=a-serial", image.display()),
        )
        .run()?;
    ensure(value(&said, "ro:")? == "1", &said)?;
    ensure(value(&said, "serial:")? == "a-serial", &said)?;
    ensure(said.contains("refused"), &said)
}

fn file_system(assets: &Assets) -> Result<()> {
    let guest = assets.guest(
        "echo queues: $(ls -d /sys/block/vda/mq/* | wc -l)
         mke2fs -q /dev/vda && mount -t ext4 /dev/vda /mnt && cp -r /bin /mnt/ && sync
         for i in 1 2 3 4; do dd if=/dev/urandom of=/mnt/$i bs=1M count=4 2>/dev/null & done; wait
         before=$(cat /mnt/1 /mnt/2 /mnt/3 /mnt/4 | md5sum); umount /mnt
         mount -t ext4 /dev/vda /mnt; after=$(cat /mnt/1 /mnt/2 /mnt/3 /mnt/4 | md5sum)
         [ \"$before\" = \"$after\" ] && echo same
         dmesg | grep -iE 'EXT4-fs error|I/O error'",
    );
    let guest = guest.modules(&["ext4"])?;
    let image = guest.path("disk");
    make_image(assets, &image, "raw", "128M")?;
    let said = guest
        .option("--cpus", "2")
        .option("--disk", format!("path={}", image.display()))
        .run()?;
    ensure(value(&said, "queues:")? == "2", &said)?;
    ensure(said.contains("same") && !said.contains("error"), &said)
}
