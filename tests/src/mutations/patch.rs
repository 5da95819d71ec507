//! The files of `tests/mutations/`.
//!
//! A file is a header of two lines and a patch as `git diff` writes it:
//!
//! ```text
//! Breaks: RAM keeps its content over a reset of the guest
//! Caught by: e2e life::a_reset_clears_memory
//! ```
//!
//! `Caught by` is `e2e` with the name of an end-to-end test, or a package with the path of a unit test.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{Context, Failure, Result, nested_host::checkout};

/// A patch that breaks a promise.
#[derive(Clone, Debug)]
pub struct Mutation {
    /// The file's name without its extension.
    pub name: String,
    /// The promise as it no longer holds.
    pub breaks: String,
    /// The test that must fail.
    pub caught_by: CatchingTest,
    /// The file.
    pub path: PathBuf,
}

impl Mutation {
    /// Its row in the table of the book.
    pub fn row(&self, verdict: &str) -> String {
        let Self {
            name,
            breaks,
            caught_by,
            ..
        } = self;
        format!("| `{name}` | {breaks} | `{caught_by}` | {verdict} |")
    }
}

/// A test that a mutation names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CatchingTest {
    /// What it belongs to.
    pub suite: Suite,
    /// Its whole name.
    pub name: String,
}

/// Tests that one program runs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Suite {
    /// The unit tests of a package of the workspace.
    Unit(String),
    /// The end-to-end tests.
    EndToEnd,
}

/// How patches name [`Suite::EndToEnd`].
const END_TO_END: &str = "e2e";

impl std::fmt::Display for Suite {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unit(package) => to.write_str(package),
            Self::EndToEnd => to.write_str(END_TO_END),
        }
    }
}

impl std::fmt::Display for CatchingTest {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(to, "{} {}", self.suite, self.name)
    }
}

/// All mutations of the checkout, unit tests first, in the order of their names.
pub fn mutations() -> Result<Vec<Mutation>> {
    let dir = checkout().join("tests/mutations");
    let files = fs::read_dir(&dir).context(format!("cannot list {}", dir.display()))?;
    let mut all = Vec::new();
    for file in files {
        let path = file.context("cannot list the mutations")?.path();
        let text = fs::read_to_string(&path).context(format!("cannot read {}", path.display()))?;
        all.push(parse(&path, &text)?);
    }
    all.sort_by(|one, other| {
        let key = |mutation: &Mutation| {
            let is_end_to_end = mutation.caught_by.suite == Suite::EndToEnd;
            (is_end_to_end, mutation.name.clone())
        };
        key(one).cmp(&key(other))
    });
    Ok(all)
}

fn parse(path: &Path, text: &str) -> Result<Mutation> {
    let bad = |why: &str| Failure(format!("{}: {why}", path.display()));
    let name = path.file_stem().and_then(|name| name.to_str());
    let mut lines = text.lines();
    let mut field = |name: &str| {
        let value = lines.next().and_then(|line| line.strip_prefix(name));
        value
            .map(|value| value.trim().to_owned())
            .filter(|value| !value.is_empty())
            .ok_or_else(|| bad(&format!("a line that begins with {name:?} is missing")))
    };
    let breaks = field("Breaks:")?;
    let caught_by = field("Caught by:")?;
    let (suite, test) = caught_by
        .split_once(' ')
        .ok_or_else(|| bad("\"Caught by:\" names no test"))?;
    let suite = match suite {
        END_TO_END => Suite::EndToEnd,
        package => Suite::Unit(package.into()),
    };
    if !text.contains("\ndiff --git ") {
        return Err(bad("it has no patch"));
    }
    Ok(Mutation {
        name: name.ok_or_else(|| bad("its name is no text"))?.into(),
        breaks,
        caught_by: CatchingTest {
            suite,
            name: test.into(),
        },
        path: path.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_and_mistakes_are_named() {
        let read = |text: &str| parse(Path::new("a/name.patch"), text);
        let whole = "Breaks: a promise\nCaught by: e2e group::test\n\ndiff --git a/x b/x\n";
        let mutation = read(whole).unwrap();
        assert_eq!(mutation.name, "name");
        assert_eq!(mutation.breaks, "a promise");
        assert_eq!(mutation.caught_by.suite, Suite::EndToEnd);
        assert_eq!(mutation.caught_by.name, "group::test");
        for (from, to, named) in [
            ("Breaks: a promise", "Breaks:", "Breaks:"),
            ("Caught by: e2e group::test", "Caught by: none", "no test"),
            ("diff --git", "diff", "no patch"),
        ] {
            let error = read(&whole.replace(from, to)).unwrap_err();
            assert!(error.0.contains(named), "{error}");
        }
    }
}
