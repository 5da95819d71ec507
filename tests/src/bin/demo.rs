//! `cargo demo`: boots a stock Debian kernel and shows its console, on any machine.

use std::{
    fs,
    path::Path,
    process::{Command, ExitCode},
};

use fanlight_tests::{
    Context, Result,
    bed::{
        Archive, Bed, Busybox, Cache, Emulator, L1Kernel, StockKernel, build_program, guest_archive,
    },
    host::{self, Kvm},
    progress,
};

/// What the guest does.
const SCRIPT: &str = r#"
echo
echo "  This is $(uname -sr), a stock Debian kernel, in a virtual machine of Fanlight's."
echo "  It has $(nproc) processor and $(($(grep MemTotal /proc/meminfo | tr -dc 0-9) / 1024)) MiB of memory,"
echo "  and reached its init $(cut -d' ' -f1 /proc/uptime) seconds after its kernel's first instruction."
echo "  Now it powers itself off."
echo
"#;
const OPTIONS: &str = "--cpus 1 --memory 512M --cmdline 'console=ttyS0 panic=-1'";

fn main() -> ExitCode {
    match demo() {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(1)),
        Err(error) => {
            eprintln!("fanlight: the demo failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn demo() -> Result<i32> {
    let fanlight = progress::step("building fanlight", || {
        build_program("fanlight", "fanlight")
    })?;
    let cache = Cache::open()?;
    let busybox = Busybox::get(&cache)?;
    let kernel = StockKernel::get(&cache)?;
    let mut initrd = guest_archive(&busybox, None, None)?;
    let mut script = Archive::default();
    script.file("test", format!("#!/bin/sh\n{SCRIPT}").as_bytes());
    initrd.extend(script.finish());
    match host::kvm() {
        Kvm::Host => {
            eprintln!("fanlight: the guest runs on this machine's /dev/kvm");
            on_host(&fanlight, &kernel.image, &initrd)
        }
        Kvm::Bed(reason) => {
            eprintln!("fanlight: the guest runs in the bed, an emulated KVM host: {reason}");
            let emulator = Emulator::get(&cache)?;
            let bed = Bed::new(emulator, busybox, L1Kernel::Stock(kernel.clone()));
            let job =
                format!("/fanlight run --kernel /vmlinuz --initrd /initrd {OPTIONS} < /dev/null");
            bed.run(&job, &[&fanlight], &[], &mut std::io::stdout(), |root| {
                root.host_file("fanlight", &fanlight)?;
                root.host_file("vmlinuz", &kernel.image)?;
                root.file("initrd", &initrd);
                Ok(())
            })
        }
    }
}

fn on_host(fanlight: &Path, kernel: &Path, initrd: &[u8]) -> Result<i32> {
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let path = dir.path().join("initrd");
    fs::write(&path, initrd).context("cannot write the guest's root")?;
    let command = format!(
        "exec {} run --kernel {} --initrd {} {OPTIONS}",
        fanlight.display(),
        kernel.display(),
        path.display()
    );
    let status = Command::new("sh")
        .args(["-c", &command])
        .status()
        .context("cannot run fanlight")?;
    Ok(status.code().unwrap_or(1))
}
