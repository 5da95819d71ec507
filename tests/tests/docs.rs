//! The documentation says what is so: links lead somewhere, JSON is what the API takes, and methods and files that are
//! named exist.
//!
//! Command lines are checked beside their parser (`vmm/src/cli/docs_tests.rs`), and blocks of `sh` run as end-to-end
//! tests (`e2e/docs.rs`).

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use fanlight_api::{VmConfig, schema};
use serde_json::{Value, json};

/// The checkout.
fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()
        .unwrap()
}

/// Files below `dir` with this extension, in order.
fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|other| other == extension) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// A page.
struct Page {
    path: PathBuf,
    /// Its lines outside blocks of code.
    prose: Vec<String>,
    /// Its blocks of code: the language and the text.
    blocks: Vec<(String, String)>,
}

impl Page {
    fn read(path: PathBuf) -> Self {
        let text = fs::read_to_string(&path).unwrap();
        let (mut prose, mut blocks, mut block) = (Vec::new(), Vec::new(), None);
        for line in text.lines() {
            match (line.trim_start().strip_prefix("```"), block.take()) {
                (Some(language), None) => block = Some((language.to_owned(), String::new())),
                (Some(_), Some(whole)) => blocks.push(whole),
                (None, Some((language, text))) => block = Some((language, text + line + "\n")),
                (None, None) => prose.push(line.to_owned()),
            }
        }
        assert!(block.is_none(), "{}: a block has no end", path.display());
        Self {
            path,
            prose,
            blocks,
        }
    }

    /// The names that headings have in links, as forges and mdBook make them.
    fn anchors(&self) -> BTreeSet<String> {
        let mut anchors = BTreeSet::new();
        for line in self.prose.iter().filter(|line| line.starts_with('#')) {
            let title = line.trim_start_matches('#').trim().to_lowercase();
            let slug: String = title
                .chars()
                .filter(|&c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
                .map(|c| if c == ' ' { '-' } else { c })
                .collect();
            let mut anchor = slug.clone();
            for number in 1.. {
                if anchors.insert(anchor.clone()) {
                    break;
                }
                anchor = format!("{slug}-{number}");
            }
        }
        anchors
    }

    /// What links lead to.
    fn links(&self) -> Vec<String> {
        let mut links = Vec::new();
        for line in &self.prose {
            let code_left_out: String = line.split('`').step_by(2).collect::<Vec<_>>().join("`");
            for rest in code_left_out.split("](").skip(1) {
                let target = rest.split([')', ' ']).next().unwrap_or_default();
                links.push(target.to_owned());
            }
        }
        links
    }

    /// What stands in backticks.
    fn names(&self) -> Vec<&str> {
        let lines = self.prose.iter();
        lines
            .flat_map(|line| line.split('`').skip(1).step_by(2))
            .collect()
    }
}

/// All pages: those at the top of the checkout and those of the book.
fn pages() -> Vec<Page> {
    let top = fs::read_dir(checkout()).unwrap();
    let mut paths: Vec<_> = top
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    paths.extend(files(&checkout().join("docs/src"), "md"));
    paths.into_iter().map(Page::read).collect()
}

/// Fails with all that is wrong at once.
fn nothing_wrong(wrong: &[String]) {
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn links_lead_somewhere() {
    let mut wrong = Vec::new();
    for page in pages() {
        for link in page.links() {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if file.is_empty() {
                page.path.clone()
            } else {
                page.path.with_file_name("").join(file)
            };
            let leads = match anchor {
                "" => target.exists(),
                anchor => target.is_file() && Page::read(target).anchors().contains(anchor),
            };
            if !leads {
                wrong.push(format!("{}: no {link}", page.path.display()));
            }
        }
    }
    nothing_wrong(&wrong);
}

#[test]
fn every_page_of_the_book_is_in_its_summary() {
    let book = checkout().join("docs/src");
    let summary = Page::read(book.join("SUMMARY.md")).links();
    let named: BTreeSet<PathBuf> = summary.iter().map(|link| book.join(link)).collect();
    for page in files(&book, "md") {
        let is_there = named.contains(&page) || page.ends_with("SUMMARY.md");
        assert!(is_there, "{} is not in the summary", page.display());
    }
}

/// The API's description of a method.
fn method(name: &str) -> Option<&'static Value> {
    let methods = schema::document()["methods"].as_array()?;
    methods.iter().find(|method| method["name"] == name)
}

/// What is wrong with JSON that is a machine or a call; other JSON is any.
fn wrong_with(json: &Value) -> Option<String> {
    if json.get("kernel").is_some() {
        return serde_json::from_value::<VmConfig>(json.clone())
            .err()
            .map(|error| error.to_string());
    }
    let name = json.get("method")?.as_str()?;
    if name == "event" {
        return None;
    }
    let Some(method) = method(name) else {
        return Some(format!("there is no method {name}"));
    };
    let params = method["params"].as_array().into_iter().flatten();
    let mut properties = json!({});
    for param in params {
        properties[param["name"].as_str()?] = param["schema"].clone();
    }
    let schema = json!({
        "type": "object",
        "properties": properties,
        "additionalProperties": false,
        "components": schema::document()["components"],
    });
    let given = json.get("params").cloned().unwrap_or(json!({}));
    let validator = jsonschema::validator_for(&schema).unwrap();
    let error = validator.iter_errors(&given).next();
    error.map(|error| format!("{name}: {error}"))
}

#[test]
fn json_is_what_the_api_takes() {
    let mut wrong = Vec::new();
    for page in pages() {
        for (_, text) in page
            .blocks
            .iter()
            .filter(|(language, _)| language == "json")
        {
            let error = match serde_json::from_str(text) {
                Ok(json) => wrong_with(&json),
                Err(error) => Some(error.to_string()),
            };
            wrong.extend(error.map(|error| format!("{}: {error}", page.path.display())));
        }
    }
    nothing_wrong(&wrong);
}

#[test]
fn json_that_the_api_refuses_is_found() {
    let call = |params: Value| json!({"method": "gpu.set_output", "params": params});
    assert_eq!(wrong_with(&call(json!({"output": 1}))), None);
    assert!(wrong_with(&call(json!({"outptu": 1}))).is_some());
    assert!(wrong_with(&call(json!({"output": "one"}))).is_some());
    assert!(wrong_with(&json!({"method": "vm.fly"})).is_some());
    assert!(wrong_with(&json!({"kernel": "k", "memroy": {}})).is_some());
}

#[test]
fn example_machines_parse() {
    let examples = files(&checkout().join("docs/src/examples"), "json");
    assert!(!examples.is_empty());
    for path in examples {
        let text = fs::read_to_string(&path).unwrap();
        let parsed = serde_json::from_str::<VmConfig>(&text);
        assert!(parsed.is_ok(), "{}: {parsed:?}", path.display());
    }
}

/// Settings of the kernel that look like methods.
const SYSCTLS: [&str; 1] = ["vm.max_map_count"];
/// Groups of methods of which no parameter has the name.
const GROUPS: [&str; 8] = [
    "vm", "gpu", "api", "events", "log", "display", "console", "device",
];

#[test]
fn methods_that_are_named_exist() {
    let mut wrong = Vec::new();
    for page in pages() {
        for name in page.names() {
            let is_word = |word: &str| word.chars().all(|c| c.is_ascii_lowercase() || c == '_');
            let is_method = name.split_once('.').is_some_and(|(group, rest)| {
                GROUPS.contains(&group) && is_word(rest) && !rest.is_empty() && rest != "sock"
            });
            if is_method && !SYSCTLS.contains(&name) && method(name).is_none() {
                wrong.push(format!("{}: no method {name}", page.path.display()));
            }
        }
    }
    nothing_wrong(&wrong);
}

/// Folders at the top of the checkout: a name that starts with one is a path there.
const TOP: [&str; 9] = [
    "api/",
    "arch/",
    "devices/",
    "docs/",
    "fuzz/",
    "resources/",
    "tests/",
    "vmm/",
    ".ci/",
];

#[test]
fn files_that_are_named_exist() {
    let mut wrong = Vec::new();
    for page in pages() {
        for name in page.names() {
            let path = name.split(['#', ' ']).next().unwrap_or_default();
            let is_path =
                TOP.iter().any(|top| path.starts_with(top)) && !path.contains(['*', '{', '<', '…']);
            // A history names files as they were.
            if is_path && !page.path.ends_with("CHANGELOG.md") && !checkout().join(path).exists() {
                wrong.push(format!("{}: no file {path}", page.path.display()));
            }
        }
    }
    nothing_wrong(&wrong);
}

#[test]
fn every_page_with_commands_that_run_is_run() {
    let runs = fs::read_to_string(checkout().join("tests/tests/e2e/docs.rs")).unwrap();
    for page in pages() {
        let has_commands = page.blocks.iter().any(|(language, _)| language == "sh");
        let path = page
            .path
            .strip_prefix(checkout())
            .unwrap()
            .display()
            .to_string();
        // Its sessions run in `e2e/api/clients.rs`.
        if has_commands && !path.ends_with("protocol.md") {
            assert!(
                runs.contains(&format!("\"{path}\"")),
                "{path} is not in e2e/docs.rs"
            );
        }
    }
}
