//! Tests that the program accepts the command lines in the documentation.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use clap::{CommandFactory, Parser};
use fanlight_api::schema;

use crate::options::{Command, CtlOptions, Options};

/// All pages with their text.
fn pages() -> Vec<(PathBuf, String)> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut folders = vec![top.join("docs/src")];
    let mut paths: Vec<_> = fs::read_dir(top)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                paths.push(path);
            }
        }
    }
    paths
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            (path, text)
        })
        .collect()
}

/// The lines of commands in a page's blocks of shell and consoles. A line that ends with a backslash goes on.
fn command_lines(page: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut language = None;
    let mut goes_on = false;
    for line in page.lines() {
        let line = line.trim();
        if let Some(name) = line.strip_prefix("```") {
            language = (language.is_none() && !name.is_empty()).then_some(name);
            goes_on = false;
            continue;
        }
        let command = match language {
            _ if goes_on => Some(line),
            Some("sh") => Some(line),
            Some("console") => line.strip_prefix("$ ").or_else(|| line.strip_prefix("# ")),
            _ => None,
        };
        let Some(command) = command else { continue };
        let part = command.trim_end_matches('\\');
        match lines.last_mut() {
            Some(last) if goes_on => *last += part,
            _ => lines.push(part.to_owned()),
        }
        goes_on = command.ends_with('\\');
    }
    lines
}

/// The words of the `fanlight` in a line, which a shell would give it; none if there is no such command.
fn words(line: &str) -> Option<Vec<String>> {
    let (mut all, mut word, mut is_word, mut quote) = (Vec::new(), String::new(), false, None);
    for c in line.chars().chain([' ']) {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => (quote, is_word) = (Some(c), true),
            (None, c) if c.is_whitespace() || matches!(c, ';' | '|' | '&') => {
                if is_word || !word.is_empty() {
                    all.push(std::mem::take(&mut word));
                }
                is_word = false;
                if !c.is_whitespace() {
                    all.push(c.to_string());
                }
            }
            (_, c) => word.push(c),
        }
    }
    // The checkout has the same name.
    let is_command = |at: &usize| all[*at] == "fanlight" && (*at == 0 || all[*at - 1] != "cd");
    let start = (0..all.len()).find(is_command)?;
    let is_redirection = |word: &str| {
        word.trim_start_matches(|c: char| c.is_ascii_digit())
            .starts_with(['<', '>'])
    };
    let own = all.into_iter().skip(start);
    let own = own.take_while(|word| !matches!(word.as_str(), ";" | "|" | "&" | "#"));
    Some(own.filter(|word| !is_redirection(word)).collect())
}

/// Describes the fault of a call by `fanlight ctl`, if it has one.
fn wrong_call(options: &CtlOptions) -> Option<String> {
    let name = options.method.as_deref()?;
    let methods = schema::document()["methods"].as_array()?;
    let Some(method) = methods.iter().find(|method| method["name"] == name) else {
        return Some(format!("there is no method {name}"));
    };
    let known: BTreeSet<&str> = method["params"]
        .as_array()?
        .iter()
        .filter_map(|param| param["name"].as_str())
        .collect();
    options.params.iter().find_map(|param| {
        let key = param.split(['=', '.']).next().unwrap_or_default();
        // The picture goes to a file of the caller.
        let is_known = known.contains(key) || (name == "gpu.screenshot" && key == "file");
        (!is_known && !param.starts_with('{')).then(|| format!("{name} has no {key}"))
    })
}

/// Describes the fault of a command line, if it has one.
fn wrong_with(words: &[String]) -> Option<String> {
    match Options::try_parse_from(words) {
        Ok(Options {
            command: Command::Ctl(options),
        }) => wrong_call(&options),
        Ok(_) => None,
        Err(error) if error.exit_code() == 0 => None,
        Err(error) => Some(error.to_string()),
    }
}

#[test]
fn command_lines_parse() {
    let (mut count, mut wrong) = (0, Vec::new());
    for (path, text) in pages() {
        for line in command_lines(&text) {
            let Some(words) = words(&line) else { continue };
            count += 1;
            let error = wrong_with(&words);
            wrong.extend(error.map(|error| format!("{}: {line}\n{error}", path.display())));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(count > 40, "only {count} command lines are found");
}

/// Options of the program and of its commands.
fn known_options(command: &clap::Command, known: &mut BTreeSet<String>) {
    let own = command
        .get_arguments()
        .filter_map(|argument| argument.get_long());
    known.extend(own.map(|name| format!("--{name}")));
    for command in command.get_subcommands() {
        known_options(command, known);
    }
}

#[test]
fn options_that_are_named_exist() {
    let mut known = BTreeSet::from(["--help", "--version"].map(str::to_owned));
    known_options(&Options::command(), &mut known);
    let mut wrong = Vec::new();
    for (path, text) in pages() {
        let names = text
            .split('`')
            .skip(1)
            .step_by(2)
            .filter_map(|code| code.split([' ', '=']).next());
        for name in names.filter(|name| name.starts_with("--") && name.len() > 2) {
            if !known.contains(name) {
                wrong.push(format!("{}: no option {name}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn wrong_command_lines_are_found() {
    let of = |line: &str| words(line).and_then(|words| wrong_with(&words));
    assert_eq!(words("echo x"), None);
    assert_eq!(
        words("until fanlight ctl 's' a 2>/dev/null; do x").unwrap(),
        ["fanlight", "ctl", "s", "a"]
    );
    assert_eq!(of("fanlight run --kernel k --disk path=x 3<>y &"), None);
    assert!(of("fanlight run --kernle k").is_some());
    assert!(of("fanlight run --disk pth=x").is_some());
    assert!(of("fanlight ctl s vm.fly").is_some());
    assert!(of("fanlight ctl s device.remove nmae=x").is_some());
    assert_eq!(
        command_lines("```console\n$ a \\\n    b\nout\n```\n```sh\nc\n```\nd"),
        ["a b", "c"]
    );
}
