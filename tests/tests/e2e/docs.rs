//! Commands of the documentation, run as a reader would run them, and example machines.

use std::{fs, path::Path, process::Command};

use fanlight_tests::{
    Context, Failure, Result, ensure,
    host_side::{
        guest::{Assets, Guest, make_image, nested_host_clock},
        test_case::TestCase,
    },
};

/// A page of the repository.
macro_rules! page {
    ($path:literal) => {
        |assets| commands(assets, include_str!(concat!("../../../", $path)))
    };
}

pub const TESTS: &[TestCase] = &[
    TestCase::new("docs::readme", page!("README.md")),
    TestCase::new(
        "docs::getting_started",
        page!("docs/src/guide/getting-started.md"),
    ),
    TestCase::new("docs::run", page!("docs/src/guide/run.md")),
    TestCase::new("docs::consoles", page!("docs/src/guide/consoles.md")),
    TestCase::new("docs::storage", page!("docs/src/guide/storage.md")),
    TestCase::new("docs::graphics", page!("docs/src/guide/graphics.md")),
    TestCase::new("docs::hotplug", page!("docs/src/guide/hotplug.md")),
    TestCase::new("docs::api", page!("docs/src/guide/api.md")),
    TestCase::new("docs::hardening", page!("docs/src/operations/hardening.md")),
    TestCase::new("docs::logging", page!("docs/src/operations/logging.md")),
    TestCase::new("docs::example_machines", examples),
];

/// A folder with the files that the pages assume: a kernel, and a root that runs `script`.
fn folder(assets: &Assets, script: &str) -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir().context("a directory")?;
    let kernel = fs::copy(&assets.stock.image, dir.path().join("vmlinuz"));
    kernel.context("cannot copy the kernel")?;
    let initrd = assets.initrd(script)?;
    fs::write(dir.path().join("initrd.img"), initrd).context("cannot write the guest's root")?;
    Ok(dir)
}

/// A shell whose commands find `fanlight`.
fn shell(assets: &Assets, dir: &Path, script: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let programs = assets.fanlight.parent().unwrap_or(Path::new("/"));
    let mut command = Command::new("sh");
    command
        .args(["-ec", script])
        .current_dir(dir)
        .env("PATH", format!("{}:{path}", programs.display()));
    command
}

/// Runs each block of `sh` of a page in a folder of its own; every command must succeed.
fn commands(assets: &Assets, page: &str) -> Result<()> {
    let blocks: Vec<_> = page
        .split("\n```sh\n")
        .skip(1)
        .filter_map(|rest| rest.split_once("\n```").map(|(block, _)| block))
        .collect();
    ensure(!blocks.is_empty(), "the page has no commands")?;
    for block in blocks {
        // A guest that the commands control stays up; other guests power off.
        let script = if block.contains("fanlight ctl") {
            "sleep 1000"
        } else {
            ""
        };
        let dir = folder(assets, script)?;
        let command = shell(assets, dir.path(), block);
        let mut session = Guest::spawn(command, dir)?;
        session
            .expect_exit(0)
            .map_err(|error| Failure::new(block, error))?;
    }
    Ok(())
}

/// Boots the example machines that need no host devices.
fn examples(assets: &Assets) -> Result<()> {
    for (name, text) in [
        (
            "minimal",
            include_str!("../../../docs/src/examples/minimal.json"),
        ),
        (
            "many-disks",
            include_str!("../../../docs/src/examples/many-disks.json"),
        ),
    ] {
        let dir = folder(assets, "echo disks: $(ls -d /sys/block/vd* | wc -l)")?;
        let path = |name: &str| dir.path().join(name);
        make_image(assets, &path("root.qcow2"), "qcow2", "16M")?;
        for image in ["data.img", "scratch.img", "install.iso"] {
            make_image(assets, &path(image), "raw", "16M")?;
        }
        fs::write(path("machine.json"), text).context("cannot write the machine")?;
        let clock = nested_host_clock();
        let script =
            format!("fanlight run --config machine.json --cmdline 'console=ttyS0 panic=-1{clock}'");
        let command = shell(assets, dir.path(), &script);
        let mut guest = Guest::spawn(command, dir)?;
        guest.expect_exit(0)?;
        let said = guest.transcript();
        let disks = text.matches("\"path\"").count();
        ensure(
            said.contains(&format!("disks: {disks}")),
            format!("{name}: {said}"),
        )?;
    }
    Ok(())
}
