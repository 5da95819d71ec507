//! Builds the program with a mutation and runs a test with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use super::{
    checkout_copy::CheckoutCopy,
    patch::{CatchingTest, Mutation, Suite},
};
use crate::{Context, Failure, Result, nested_host::checkout};

/// The program is built with these settings: seconds for a changed file, instead of a minute.
const PROFILE: [(&str, &str); 4] = [
    ("CARGO_PROFILE_RELEASE_INCREMENTAL", "true"),
    ("CARGO_PROFILE_RELEASE_LTO", "off"),
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1"),
    ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "256"),
];
/// The last lines of a build that fails.
const LINES: usize = 30;

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It failed.
    Failed,
    /// It passed.
    Passed,
}

/// Runs tests on a copy of the checkout.
#[derive(Debug)]
pub struct Runner {
    copy: CheckoutCopy,
    logs: PathBuf,
}

impl Runner {
    /// Makes the copy.
    pub fn new() -> Result<Self> {
        let logs = checkout().join("target/mutations/logs");
        fs::create_dir_all(&logs).context(format!("cannot make {}", logs.display()))?;
        Ok(Self {
            copy: CheckoutCopy::make()?,
            logs,
        })
    }

    /// Runs the tests that these mutations name, without any mutation. They must pass.
    pub fn run_unchanged(&mut self, mutations: &[Mutation]) -> Result<()> {
        self.copy.restore()?;
        let mut suites = BTreeMap::<_, BTreeSet<_>>::new();
        for mutation in mutations {
            let CatchingTest { suite, name } = &mutation.caught_by;
            suites.entry(suite).or_default().insert(&**name);
        }
        for (suite, names) in suites {
            let names: Vec<_> = names.into_iter().collect();
            let log = format!("unchanged-{suite}");
            if self.test(suite, &names, &log)? == Outcome::Failed {
                let log = self.log(&log);
                let log = log.display();
                return Err(Failure(format!(
                    "a test of {suite} fails without a mutation: see {log}"
                )));
            }
        }
        Ok(())
    }

    /// How the mutation's test ends with the mutation.
    pub fn run(&mut self, mutation: &Mutation) -> Result<Outcome> {
        self.copy.restore()?;
        self.copy.apply(mutation)?;
        let CatchingTest { suite, name } = &mutation.caught_by;
        let outcome = self.test(suite, &[name], &mutation.name);
        self.copy.restore()?;
        outcome
    }

    fn test(&self, suite: &Suite, names: &[&str], log: &str) -> Result<Outcome> {
        let mut command = match suite {
            Suite::Unit(package) => {
                let target = ["--package", package, "--lib", "--bins"];
                let mut build = self.cargo("test");
                self.build(build.args(target).arg("--no-run"), log)?;
                let mut command = self.cargo("test");
                command.args(target).args(["--", "--exact"]).args(names);
                command
            }
            Suite::EndToEnd => {
                let mut build = self.cargo("build");
                self.build(build.args(["--release", "--package", "fanlight"]), log)?;
                // The tests and what they run in guests are the checkout's: they have no mutation.
                let program = self.copy.root.join("target/release/fanlight");
                let mut command = cargo();
                command
                    .current_dir(checkout())
                    .args(["test", "--package", "fanlight-tests", "--test", "e2e"])
                    .args(["--", "--exact", &names.join(",")])
                    .env("FANLIGHT_TEST_PROGRAM", program);
                command
            }
        };
        let output = self.output(&mut command, log)?;
        let text = String::from_utf8_lossy(&output.stdout);
        let results: Vec<_> = text.lines().filter_map(counts).collect();
        let sum = |of: fn(&Counts) -> usize| results.iter().map(of).sum::<usize>();
        match (sum(|counts| counts.passed), sum(|counts| counts.failed)) {
            (passed, 0) if passed == names.len() => Ok(Outcome::Passed),
            (_, 1..) => Ok(Outcome::Failed),
            _ => {
                let (names, log) = (names.join(", "), self.log(log));
                let log = log.display();
                Err(Failure(format!("{suite} did not run {names}: see {log}")))
            }
        }
    }

    fn build(&self, command: &mut Command, log: &str) -> Result<()> {
        let output = self.output(command, log)?;
        if output.status.success() {
            return Ok(());
        }
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        let lines: Vec<_> = errors.lines().collect();
        let last = &lines[lines.len().saturating_sub(LINES)..];
        Err(Failure::new("it does not compile", last.join("\n")))
    }

    /// Cargo in the copy.
    fn cargo(&self, verb: &str) -> Command {
        let mut command = cargo();
        command
            .current_dir(&self.copy.root)
            .arg(verb)
            .envs(PROFILE)
            .env_remove("CARGO_TARGET_DIR");
        command
    }

    /// Runs a command to its end, and keeps what it said.
    fn output(&self, command: &mut Command, log: &str) -> Result<Output> {
        let output = command
            .stdin(Stdio::null())
            .output()
            .context("cannot run cargo")?;
        let path = self.log(log);
        fs::write(&path, [&*output.stderr, &*output.stdout].concat())
            .context(format!("cannot write {}", path.display()))?;
        Ok(output)
    }

    fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }
}

/// What one test program counted.
struct Counts {
    passed: usize,
    failed: usize,
}

/// Reads the last line of a test program, such as `test result: ok. 1 passed; 0 failed; …`.
fn counts(line: &str) -> Option<Counts> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |what: &str| -> Option<usize> {
        let mut counts = counts.split("; ");
        counts.find_map(|count| count.strip_suffix(what)?.trim().parse().ok())
    };
    Some(Counts {
        passed: count("passed")?,
        failed: count("failed")?,
    })
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // The variables of the package that this program belongs to.
    for (name, _) in std::env::vars_os() {
        if name
            .to_str()
            .is_some_and(|name| name.starts_with("CARGO_PKG_"))
        {
            command.env_remove(name);
        }
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted() {
        let line =
            "test result: FAILED. 3 passed; 12 failed; 0 ignored; 0 measured; 9 filtered out";
        let found = counts(line).unwrap();
        assert_eq!((found.passed, found.failed), (3, 12));
        assert!(counts("test a::b ... ok").is_none());
    }
}
