//! Kernels boot and see the configured machine.

use std::fs;

use fanlight_tests::{
    Context, Result, ensure,
    host_side::{
        guest::{Assets, GuestKernel},
        kvm_host::IN_NESTED_HOST,
        test_case::TestCase,
    },
    value,
};

pub const TESTS: &[TestCase] = &[
    TestCase::new("boot::one_cpu", |assets| cpus(assets, 1)),
    TestCase::new("boot::two_cpus", |assets| cpus(assets, 2)),
    TestCase::new("boot::eight_cpus", |assets| cpus(assets, 8)),
    TestCase::new("boot::ten_cpus", |assets| cpus(assets, 10)),
    TestCase::new("boot::memory_128m", |assets| memory(assets, "128M", 128)),
    TestCase::new("boot::memory_512m", |assets| memory(assets, "512M", 512)),
    TestCase::new("boot::memory_6g_around_the_hole", |assets| {
        memory(assets, "6G", 6144)
    }),
    TestCase::new("boot::huge_pages", huge_pages).alone(),
    TestCase::new("boot::vmlinux_by_pvh", vmlinux_by_pvh),
    TestCase::new("boot::a_kernel_that_unpacks_itself", unpacks_itself),
    TestCase::new("boot::kernel_addresses_are_random", addresses_are_random),
    TestCase::new("boot::acpi_and_clock", acpi_and_clock),
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
             dd if=/dev/urandom bs=1M count=$(($free / 2048 > 64 ? 64 : $free / 2048)) 2>/dev/null |
                 tee /mnt/x | md5sum | sed 's/ .*//; s/^/written: /'
             echo read: $(md5sum < /mnt/x | cut -d' ' -f1)",
        )
        .option("--memory", size)
        .run()?;
    let total: u64 = value(&said, "total:")?.parse().unwrap_or(0) / 1024;
    // The kernel reserves some memory for itself.
    ensure(
        total <= mib && total + total / 16 + 80 >= mib,
        format!("the guest sees {total} MiB of {mib}\n{said}"),
    )?;
    ensure(value(&said, "read:")? == value(&said, "written:")?, &said)
}

fn huge_pages(assets: &Assets) -> Result<()> {
    let before = counted(&pages("2048kB", "nr"))?;
    fs::write(pages("2048kB", "nr"), "140").context("cannot reserve huge pages")?;
    let result = in_huge_pages(assets, "256M", "2M", "2048kB", 128);
    fs::write(pages("2048kB", "nr"), before.to_string()).context("cannot give pages back")?;
    result?;
    // The nested host's kernel reserves such a page at boot; another host may have none.
    if counted(&pages("1048576kB", "nr"))? == 0 && std::env::var_os(IN_NESTED_HOST).is_none() {
        eprintln!("fanlight: pages of 1 GiB are not tried: this host has none");
        return Ok(());
    }
    in_huge_pages(assets, "1G", "1G", "1048576kB", 1)
}

/// The sysfs file that counts the host's huge pages of a size.
fn pages(size: &str, count: &str) -> String {
    format!("/sys/kernel/mm/hugepages/hugepages-{size}/{count}_hugepages")
}

fn counted(path: &str) -> Result<u64> {
    let text = fs::read_to_string(path).context(format!("cannot read {path}"))?;
    text.trim().parse().context(path)
}

/// A guest's memory takes `count` huge pages of a size. A guest that needs more than are free is refused.
fn in_huge_pages(assets: &Assets, memory: &str, size: &str, dir: &str, count: u64) -> Result<()> {
    let free = || counted(&pages(dir, "free"));
    let guest = |script, memory: &str| {
        assets
            .guest(script)
            .option("--memory", format!("{memory},hugepages={size}"))
    };
    let before = free()?;
    let mut running = guest("echo ready; read line", memory).start()?;
    running.wait_for("ready")?;
    let taken = before - free()?;
    running.send("\n")?;
    running.expect_exit(0)?;
    let kib: u64 = dir.trim_end_matches("kB").parse().context("a size")?;
    let too_much = (counted(&pages(dir, "nr"))? + 1) * kib;
    let mut refused = guest("", &format!("{too_much}K")).start()?;
    refused.expect_exit(2)?;
    let said = refused.transcript();
    ensure(
        taken == count,
        format!("{taken} huge pages are taken, not {count}"),
    )?;
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

/// Prints the addresses of the kernel's text and of its entry in the memory map.
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
