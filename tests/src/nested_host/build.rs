//! Programs of this workspace for the nested host.

use std::{
    env, fs,
    io::IsTerminal,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::command::run;
use crate::{Context, Failure, Result, progress};

/// The checkout that this program was built from.
pub fn checkout() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).into()
}

/// Names a `fanlight` that is tested or measured, where it is not the one of this checkout.
const PROGRAM: &str = "FANLIGHT_TEST_PROGRAM";

/// The `fanlight` to test or to measure: the one that `FANLIGHT_TEST_PROGRAM` names, or this checkout's, built.
pub fn program_under_test() -> Result<PathBuf> {
    match env::var_os(PROGRAM) {
        Some(path) => fs::canonicalize(&path).context(format!("cannot find the {PROGRAM}")),
        None => build_program("fanlight", "fanlight"),
    }
}

/// Builds a program of this workspace in release mode and returns its path. Cargo shows its progress on a terminal.
pub fn build_program(package: &str, program: &str) -> Result<PathBuf> {
    let manifest = checkout().join("Cargo.toml");
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["build", "--release"])
        .arg("--message-format=json-render-diagnostics")
        .args(["--package", package, "--bin", program, "--manifest-path"])
        .arg(&manifest);
    let what = format!("building {program} in release mode");
    let messages = if std::io::stderr().is_terminal() {
        eprintln!("fanlight: {what}");
        let output = command
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run cargo")?;
        String::from_utf8_lossy(&output.stdout).into_owned()
    } else {
        progress::step(&what, |_| run(&mut command))?
    };
    // Of the messages only the one about the program has an executable.
    messages
        .lines()
        .filter_map(|line| line.split_once("\"executable\":\""))
        .filter_map(|(_, rest)| rest.split_once('"'))
        .map(|(path, _)| PathBuf::from(path))
        .find(|path| path.file_name().is_some_and(|name| name == program))
        .ok_or_else(|| Failure(format!("cargo built no program {program}")))
}
