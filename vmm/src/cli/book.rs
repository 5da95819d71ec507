//! The book's page of all options, `docs/src/guide/options.md`. `FANLIGHT_BLESS=1 cargo test -p fanlight
//! options_page` writes it; the test fails when the file differs.

use clap::Command;

use crate::{command, option_page::Page, option_table};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/src/guide/options.md");

const HEAD: &str = "\
# All options

<!-- Generated: FANLIGHT_BLESS=1 cargo test -p fanlight --bin fanlight options_page -->

`fanlight help COMMAND` prints the help of a command; `fanlight help OPTION` describes an option of
`fanlight run`.
`fanlight man DIR` writes the manual pages, and `fanlight completions SHELL` prints a completion script.
";

fn page() -> String {
    let mut root = command::command().term_width(80);
    root.build();
    let mut page = HEAD.to_owned();
    add(&mut page, &root, "fanlight");
    let run = command::plain();
    let run = run.find_subcommand("run").unwrap();
    page += "\n# Options of `fanlight run`\n";
    for arg in run.get_arguments() {
        if let Some(option) = arg.get_long().and_then(option_table::find) {
            page += &option_page(&Page::new(option), &command::about(arg));
        }
    }
    page
}

/// Adds the help of a command and of its subcommands.
fn add(page: &mut String, command: &Command, typed: &str) {
    let help = command
        .clone()
        .term_width(80)
        .render_long_help()
        .to_string();
    let lines: Vec<_> = help.lines().map(str::trim_end).collect();
    *page += &format!(
        "\n## `{typed}`\n\n```text\n{}\n```\n",
        lines.join("\n").trim_end()
    );
    for subcommand in command.get_subcommands() {
        if !subcommand.is_hide_set() {
            add(
                page,
                subcommand,
                &format!("{typed} {}", subcommand.get_name()),
            );
        }
    }
}

fn option_page(page: &Page, about: &str) -> String {
    let name = page.name;
    let grammar = page.grammar_lines(72).join("\n");
    let mut out = format!("\n## `--{name}`\n\n```text\n--{name} {grammar}\n```\n");
    for paragraph in about.split("\n\n") {
        let end = if paragraph.ends_with('.') { "" } else { "." };
        out += &format!("\n{paragraph}{end}\n");
    }
    if !page.entries.is_empty() {
        out += "\n| value | meaning |\n|---|---|\n";
    }
    for entry in &page.entries {
        let mut text = entry.text.clone();
        for (word, meaning) in &entry.words {
            text += &format!("<br>`{word}`: {meaning}");
        }
        // A bar within a cell is escaped, in code too.
        out += &format!("| `{}` | {text} |\n", entry.term.replace('|', "\\|"));
    }
    if !page.notes.is_empty() {
        out += &format!("\n{}\n", page.notes.join("\n"));
    }
    out += &format!("\n```text\n{}\n```\n", page.examples.join("\n"));
    out += &format!("\n```json\n{}\n```\n", page.json);
    out
}

#[test]
fn options_page_is_current() {
    let page = page();
    if std::env::var_os("FANLIGHT_BLESS").is_some() {
        std::fs::write(FILE, &page).unwrap();
    }
    let found = std::fs::read_to_string(FILE).unwrap_or_default();
    let differs = found.lines().zip(page.lines()).find(|(a, b)| a != b);
    assert!(
        found == page,
        "{FILE} is out of date: run FANLIGHT_BLESS=1 cargo test -p fanlight --bin fanlight options_page; \
         first difference: {differs:?}"
    );
}
