//! Bad input: one line that names the fault, exit status 2, and nothing started.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::Command,
};

use fanlight_tests::{
    Context, Result, ensure,
    host_side::{
        guest::{Assets, make_image, qemu_img},
        test_case::TestCase,
    },
};

pub const TESTS: &[TestCase] = &[
    TestCase::new("input::files_and_numbers", files_and_numbers),
    TestCase::new("input::disks", disks),
    TestCase::new("input::kvm", kvm),
];

/// Runs `fanlight run` with `arguments`, which it must refuse in one line that contains `expected`.
fn refused(assets: &Assets, arguments: &[&str], expected: &str) -> Result<()> {
    let output = Command::new(&assets.fanlight)
        .arg("run")
        .args(arguments)
        .output()
        .context("cannot run fanlight")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure(
        output.status.code() == Some(2) && said.contains(expected) && output.stdout.is_empty(),
        format!(
            "{arguments:?}: {}, expected {expected:?}, said {said:?}",
            output.status
        ),
    )?;
    let lines = said.lines().filter(|line| !line.trim().is_empty()).count();
    ensure(
        lines == 1 || said.starts_with("error:"),
        format!("{arguments:?}: more than one line: {said}"),
    )
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap_or_default()
}

fn files_and_numbers(assets: &Assets) -> Result<()> {
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let kernel = text(&assets.stock.image);
    let write = |name: &str, bytes: &[u8]| -> Result<String> {
        let path = dir.path().join(name);
        fs::write(&path, bytes).context("cannot write")?;
        Ok(text(&path).to_owned())
    };
    let image = fs::read(&assets.stock.image).context("cannot read the kernel")?;
    let truncated = write("truncated", &image[..image.len() / 2])?;
    let mut corrupt = image.clone();
    let middle = corrupt.len() / 2;
    corrupt[middle..middle + 64].fill(0x55);
    let corrupt = write("corrupt", &corrupt)?;
    let junk = write("junk", &[0x42; 8192])?;
    let big = write("big", &vec![0; 200 << 20])?;
    let long = "x".repeat(3000);
    let with = |more: &[&'static str]| [&["--kernel", kernel], more].concat();
    refused(assets, &[], "--kernel: no kernel is named")?;
    refused(
        assets,
        &["--kernel", "/nowhere"],
        "--kernel: /nowhere: cannot open it",
    )?;
    refused(assets, &["--kernel", &junk], "not a kernel")?;
    refused(assets, &["--kernel", &truncated], "truncated")?;
    refused(assets, &["--kernel", &corrupt], "payload is corrupt")?;
    refused(
        assets,
        &with(&["--initrd", "/nowhere"]),
        "--initrd: /nowhere",
    )?;
    let initrd = ["--kernel", kernel, "--memory", "128M", "--initrd", &big];
    refused(assets, &initrd, "does not fit")?;
    refused(
        assets,
        &["--kernel", kernel, "--cmdline", &long],
        "command line has 3000 bytes",
    )?;
    refused(assets, &with(&["--cpus", "0"]), "0 vCPUs")?;
    refused(assets, &with(&["--cpus", "100000"]), "100000 vCPUs")?;
    refused(assets, &with(&["--memory", "900G"]), "the host has")?;
    refused(assets, &with(&["--memory", "1"]), "give a multiple of")?;
    refused(assets, &with(&["--memory", "2M,hugepages=2M"]), "at least")?;
    refused(
        assets,
        &with(&["--memory", "512M,hugepages=1G"]),
        "multiple of 1048576K",
    )?;
    refused(
        assets,
        &with(&["--memory", "512M,hugepages=2M"]),
        "too few free",
    )?;
    refused(assets, &with(&["--net", "tap=a/b"]), "an interface's name")?;
    refused(assets, &with(&["--net", "tap=lo"]), "not a tap")?;
    refused(
        assets,
        &with(&["--net", "tap=t,mac=1"]),
        "not a hardware address",
    )?;
    refused(assets, &with(&["--vsock", "cid=2"]), "must be from 3")?;
    refused(
        assets,
        &with(&["--serial", "file=/nowhere/x"]),
        "cannot write console output",
    )
}

fn disks(assets: &Assets) -> Result<()> {
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let (raw, qcow2) = (dir.path().join("raw"), dir.path().join("qcow2"));
    make_image(assets, &raw, "raw", "16M")?;
    make_image(assets, &qcow2, "qcow2", "16M")?;
    let refuse = |disk: String, expected: &str| {
        let arguments = ["--kernel", text(&assets.stock.image), "--disk", &disk];
        refused(assets, &arguments, expected)
    };
    refuse(
        "path=/nowhere".into(),
        "disk disk0: /nowhere: cannot open it",
    )?;
    refuse(format!("path={}", qcow2.display()), "set format to qcow2")?;
    refuse(
        format!("path={},format=qcow2", raw.display()),
        "not a qcow2 image",
    )?;
    let raw_name = text(&raw);
    let (backed, split) = (dir.path().join("backed"), dir.path().join("split"));
    let of_raw = ["create", "-q", "-f", "qcow2", "-b", raw_name, "-F", "raw"];
    qemu_img(assets, &of_raw, &backed, &[])?;
    let data_file = format!("data_file={}", text(&dir.path().join("data")));
    let with_data = ["create", "-q", "-f", "qcow2", "-o", &data_file];
    qemu_img(assets, &with_data, &split, &["16M"])?;
    for image in [backed, split] {
        refuse(
            format!("path={},format=qcow2", image.display()),
            "backing or data files must be converted first",
        )?;
    }
    let mut guest = assets
        .guest("echo ready; sleep 1000")
        .option("--disk", format!("path={raw_name}"))
        .start()?;
    guest.wait_for("ready")?;
    refuse(format!("path={raw_name}"), "in use by another process")?;
    let by_qemu = qemu_img(assets, &["resize", "-q", "-f", "raw"], &raw, &["32M"]);
    let error = by_qemu
        .err()
        .map_or_else(String::new, |error| error.to_string());
    ensure(error.contains("lock"), format!("QEMU took it: {error}"))
}

fn kvm(assets: &Assets) -> Result<()> {
    let said = |command: &mut Command, expected: &str| {
        let output = command.output().context("cannot run fanlight")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure(
            output.status.code() == Some(2) && said.contains(expected),
            format!("{}: expected {expected:?}, said {said:?}", output.status),
        )
    };
    let kernel = text(&assets.stock.image);
    // In a mount namespace that hides the device.
    let hidden = format!(
        "mount -t tmpfs none /dev && exec {} run --serial null --kernel {kernel}",
        text(&assets.fanlight)
    );
    said(
        Command::new("unshare").args(["-m", "sh", "-c", &hidden]),
        "no /dev/kvm",
    )?;
    // As an unprivileged user.
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let open = fs::Permissions::from_mode(0o755);
    fs::set_permissions(dir.path(), open.clone()).context("cannot open a directory")?;
    let copy = dir.path().join("fanlight");
    fs::copy(&assets.fanlight, &copy).context("cannot copy fanlight")?;
    fs::set_permissions(&copy, open).context("cannot open a program")?;
    said(
        Command::new(&copy)
            .args(["run", "--serial", "null", "--kernel", kernel])
            .uid(65534)
            .gid(65534),
        "no permission on /dev/kvm",
    )
}
