//! Disks keep data that the guest was told is written, even if the process is killed.

use std::os::unix::fs::MetadataExt;

use fanlight_tests::{
    Context, Result, ensure,
    host_side::{
        guest::{Assets, make_image, qemu_img},
        test_case::TestCase,
    },
    value,
};
use rustix::process::Signal;

pub const TESTS: &[TestCase] = &[
    TestCase::new("disk::raw_survives_sigkill", |assets| {
        survives(assets, "raw")
    }),
    TestCase::new("disk::qcow2_survives_sigkill", |assets| {
        survives(assets, "qcow2")
    }),
    TestCase::new("disk::qcow2_discards", |assets| {
        discards(assets, "qcow2").map(drop)
    }),
    TestCase::new("disk::raw_discards", |assets| {
        let kept = discards(assets, "raw")?;
        ensure(
            kept <= 12 << 20,
            format!("{kept} bytes of the image are still allocated"),
        )
    }),
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

/// Writes 16 MiB and discards 4 MiB of them. Returns the allocated size of the image in bytes.
fn discards(assets: &Assets, format: &str) -> Result<u64> {
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
    if format == "qcow2" {
        qemu_img(assets, &["check", "-q", "-f", format], &image, &[])?;
    }
    let taken = std::fs::metadata(&image).context("the image is gone")?;
    Ok(taken.blocks() * 512)
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
    let image = guest.path("disk");
    make_image(assets, &image, "raw", "128M")?;
    let said = guest
        .option("--cpus", "2")
        .option("--disk", format!("path={}", image.display()))
        .run()?;
    ensure(value(&said, "queues:")? == "2", &said)?;
    ensure(said.contains("same") && !said.contains("error"), &said)
}
