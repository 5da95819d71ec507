//! Kernels start, and see the machine that was asked for.

use std::fs;

use fanlight_tests::{
    Context, Result,
    guest::{Assets, GuestKernel, ensure, value},
};

use crate::Test;

pub const TESTS: &[(&str, Test)] = &[
    ("boot::one_cpu", |assets| cpus(assets, 1)),
    ("boot::two_cpus", |assets| cpus(assets, 2)),
    ("boot::eight_cpus", |assets| cpus(assets, 8)),
    ("boot::memory_128m", |assets| memory(assets, "128M", 128)),
    ("boot::memory_512m", |assets| memory(assets, "512M", 512)),
    ("boot::memory_6g_around_the_hole", |assets| {
        memory(assets, "6G", 6144)
    }),
    ("boot::huge_pages", huge_pages),
    ("boot::vmlinux_by_pvh", vmlinux_by_pvh),
    ("boot::a_kernel_that_unpacks_itself", unpacks_itself),
    ("boot::kernel_addresses_are_random", addresses_are_random),
    ("boot::acpi_and_clock", acpi_and_clock),
];

fn cpus(assets: &Assets, count: u32) -> Result<()> {
    let said = assets
        .guest(
            "echo cpus: $(nproc)
             for cpu in $(seq 0 $(($(nproc) - 1))); do taskset -c $cpu true & done; wait
             echo calls: $(grep -E 'CAL:|RES:' /proc/interrupts)
             echo cores: $(grep -c . /sys/devices/system/cpu/cpu*/topology/core_id | wc -l)
             echo x2apic: $(grep -c -w x2apic /proc/cpuinfo)
             dmesg | grep -iE 'firmware bug|call trace|TSC_DEADLINE.*disabled'
             echo clocksource: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)",
        )
        .option("--cpus", count.to_string())
        .run()?;
    let count_text = count.to_string();
    for line in ["cpus:", "cores:", "x2apic:"] {
        ensure(value(&said, line)? == count_text, &said)?;
    }
    ensure(value(&said, "clocksource:")? == "kvm-clock", &said)?;
    ensure(!said.to_lowercase().contains("firmware bug"), &said)?;
    let sent: u64 = value(&said, "calls:")?
        .split_whitespace()
        .filter_map(|word| word.parse::<u64>().ok())
        .sum();
    ensure(
        count == 1 || sent > 0,
        format!("no processor called another:\n{said}"),
    )
}

fn memory(assets: &Assets, size: &str, mib: u64) -> Result<()> {
    let said = assets
        .guest(
            "echo total: $(grep MemTotal /proc/meminfo | tr -dc 0-9)
             mount -t tmpfs -o size=90% t /mnt; free=$(grep MemAvailable /proc/meminfo | tr -dc 0-9)
             dd if=/dev/zero of=/mnt/x bs=1M count=$(($free / 2048 > 256 ? 256 : $free / 2048)) 2>/dev/null
             echo filled: $(md5sum < /mnt/x | wc -c)",
        )
        .option("--memory", size)
        .run()?;
    let total: u64 = value(&said, "total:")?.parse().unwrap_or(0) / 1024;
    // The kernel takes its own share first.
    ensure(
        total <= mib && total + total / 16 + 80 >= mib,
        format!("{total} MiB of {mib}\n{said}"),
    )?;
    ensure(value(&said, "filled:")? == "36", &said)
}

fn huge_pages(assets: &Assets) -> Result<()> {
    const RESERVED: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let free = || -> Result<u64> {
        let text = fs::read_to_string(FREE).context("cannot count huge pages")?;
        Ok(text.trim().parse().unwrap_or(0))
    };
    let before = fs::read_to_string(RESERVED).context("cannot read the host's huge pages")?;
    fs::write(RESERVED, "140").context("cannot reserve huge pages")?;
    let guest = |script, memory| assets.guest(script).option("--memory", memory);
    let mut running = guest("echo ready; read line", "256M,hugepages=2M").start()?;
    running.wait_for("ready")?;
    let taken = 140 - free()?;
    running.send("\n")?;
    running.expect_exit(0)?;
    let mut refused = guest("", "512M,hugepages=2M").start()?;
    refused.expect_exit(2)?;
    let said = refused.transcript();
    fs::write(RESERVED, before.trim()).context("cannot give huge pages back")?;
    ensure(taken == 128, format!("{taken} huge pages are taken"))?;
    ensure(said.contains("nr_hugepages"), &said)
}

fn vmlinux_by_pvh(assets: &Assets) -> Result<()> {
    let said = assets
        .guest("echo kernel: $(uname -r); echo cpus: $(nproc); echo memory: $(grep MemTotal /proc/meminfo)")
        .kernel(GuestKernel::Vmlinux)
        .option("--cpus", "2")
        .run()?;
    ensure(!value(&said, "kernel:")?.contains("amd64"), &said)?;
    ensure(value(&said, "cpus:")? == "2", &said)
}

fn unpacks_itself(assets: &Assets) -> Result<()> {
    let said = assets
        .guest("echo kernel: $(uname -r)")
        .option("--unpack", "guest")
        .run()?;
    ensure(value(&said, "kernel:")?.contains("amd64"), &said)
}

/// Where the kernel's text and its map of memory are.
const ADDRESSES: &str = "echo 0 > /proc/sys/kernel/kptr_restrict
    echo text: $(grep ' _text$' /proc/kallsyms | cut -c1-16)
    echo iomem: $(grep 'Kernel code' /proc/iomem)";

fn addresses_are_random(assets: &Assets) -> Result<()> {
    let mut texts = Vec::new();
    let mut places = Vec::new();
    for _ in 0..3 {
        let said = assets.guest(ADDRESSES).run()?;
        texts.push(value(&said, "text:")?.to_owned());
        places.push(value(&said, "iomem:")?.to_owned());
    }
    for list in [&mut texts, &mut places] {
        list.sort();
        list.dedup();
        ensure(list.len() > 1, format!("always at {list:?}"))?;
    }
    let said = assets.guest(ADDRESSES).cmdline("nokaslr").run()?;
    ensure(value(&said, "text:")? == "ffffffff81000000", &said)
}

fn acpi_and_clock(assets: &Assets) -> Result<()> {
    let said = assets
        .guest(
            "echo host: $(ls /sys/bus/acpi/devices | grep -c PNP0A08)
             echo rtc: $(cat /sys/class/rtc/rtc0/since_epoch)
             echo errors: $(dmesg | grep -ciE 'acpi.*error|firmware bug|bios bug')
             dmesg | grep -iE 'acpi.*error|firmware bug|bios bug'",
        )
        .run()?;
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |now| now.as_secs());
    ensure(value(&said, "host:")? == "1", &said)?;
    ensure(value(&said, "errors:")? == "0", &said)?;
    let clock: u64 = value(&said, "rtc:")?.parse().unwrap_or(0);
    ensure(
        clock.abs_diff(now) < 300,
        format!("{clock} is not near {now}"),
    )
}
