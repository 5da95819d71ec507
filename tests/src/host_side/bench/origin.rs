//! Where the figures of a table come from.

use std::{fs, process::Command};

use crate::{
    Result,
    nested_host::{checkout, run_command},
};

/// Folders with the code of the product.
const PRODUCT: [&str; 4] = ["api", "arch", "devices", "vmm"];

/// The line above a table: commit, date, host and rounds. `host` says whose KVM it was.
pub fn line(host: &str, rounds: usize) -> Result<String> {
    let git = |arguments: &[&str]| {
        let mut git = Command::new("git");
        run_command(git.arg("-C").arg(checkout()).args(arguments))
    };
    let commit = git(&["rev-parse", "--short=10", "HEAD"])?;
    let changed = git(&[&["status", "--porcelain", "--"], &PRODUCT[..]].concat())?;
    let changed = match changed.trim().is_empty() {
        true => "",
        false => " with changes",
    };
    let date = run_command(Command::new("date").args(["-u", "+%Y-%m-%d"]))?;
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("an unknown processor", |(_, model)| model);
    let (commit, date) = (commit.trim(), date.trim());
    let rounds = match rounds {
        1 => "one round".into(),
        rounds => format!("{rounds} rounds: medians (least–most)"),
    };
    Ok(format!(
        "Commit `{commit}`{changed}, {date}, {host} on {processors} × {model}, {rounds}."
    ))
}
