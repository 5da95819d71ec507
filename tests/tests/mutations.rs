//! The patches of `tests/mutations/` fit the checkout, and the book lists them.

use std::{fs, path::Path, process::Command};

use fanlight_tests::{
    mutations::{Mutation, Suite, mutations},
    nested_host::checkout,
};

/// What the files of Rust below `dir` say.
fn source(dir: &Path) -> String {
    let files = fs::read_dir(dir).unwrap().map(|file| file.unwrap().path());
    files
        .map(|path| match path.extension() {
            _ if path.is_dir() => source(&path),
            Some(extension) if extension == "rs" => fs::read_to_string(&path).unwrap(),
            _ => String::new(),
        })
        .collect()
}

#[test]
fn every_patch_applies() {
    for Mutation { name, path, .. } in mutations().unwrap() {
        let output = Command::new("git")
            .arg("-C")
            .arg(checkout())
            .args(["apply", "--check"])
            .arg(path.canonicalize().unwrap())
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {errors}");
    }
}

#[test]
fn every_patch_names_a_test() {
    let end_to_end = source(&checkout().join("tests/tests/e2e"));
    for mutation in mutations().unwrap() {
        let test = &mutation.caught_by;
        let exists = match &test.suite {
            Suite::EndToEnd => end_to_end.contains(&format!("\"{}\"", test.name)),
            Suite::Unit(package) => {
                let dir = match package.as_str() {
                    "fanlight" => "vmm",
                    other => other.trim_start_matches("fanlight-"),
                };
                let function = test.name.rsplit("::").next().unwrap();
                source(&checkout().join(dir).join("src")).contains(&format!("fn {function}("))
            }
        };
        assert!(exists, "{}: there is no test {test}", mutation.name);
    }
}

#[test]
fn the_book_lists_every_patch() {
    let page = checkout().join("docs/src/testing/mutations.md");
    let page = fs::read_to_string(page).unwrap();
    let rows: Vec<_> = page
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    let mutations = mutations().unwrap();
    for mutation in &mutations {
        let row = mutation.row("caught");
        assert!(
            rows.contains(&&*row),
            "this row is missing or differs:\n{row}"
        );
    }
    assert_eq!(rows.len(), mutations.len(), "the book has rows of others");
}
