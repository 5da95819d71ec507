//! `fanlight help`: describes a command, or an option of `fanlight run`.

use clap::Command;
use fanlight_api::error::nearest;

use crate::{command, option_page::Page, option_table, text};

/// The help on a topic; `Err` if there is no such topic.
pub fn on(topic: &[String]) -> Result<String, String> {
    let mut root = command::command();
    root.build();
    if topic.is_empty() {
        return Ok(root.render_long_help().to_string());
    }
    let mut found = Vec::new();
    if let Some(command) = subcommand(&root, topic) {
        found.push(command.clone().render_long_help().to_string());
    }
    let option = match topic {
        [option] => Some(option),
        [run, option] if run == "run" => Some(option),
        _ => None,
    };
    found.extend(option.and_then(|option| option_help(&root, option)));
    if found.is_empty() {
        return Err(unknown(&root, &topic.join(" ")));
    }
    Ok(found.join("\n"))
}

/// The page of an option of `fanlight run`, with or without the dashes.
pub fn option_help(root: &Command, name: &str) -> Option<String> {
    let name = name.strip_prefix("--").unwrap_or(name);
    let plain = command::plain();
    let run = plain.find_subcommand("run")?;
    let arg = run.get_arguments().find(|arg| arg.get_long() == Some(name));
    let about = command::about(arg?);
    let width = text::terminal_width();
    if let Some(option) = option_table::find(name) {
        return Some(page_text(&Page::new(option), &about, width));
    }
    let arg = root.find_subcommand("run")?.get_arguments();
    let arg = arg.into_iter().find(|arg| arg.get_long() == Some(name))?;
    Some(format!(
        "Option of 'fanlight run': {arg}\n\n{}",
        paragraphs(&about, width)
    ))
}

/// Paragraphs of help, each ended as a sentence.
fn paragraphs(about: &str, width: usize) -> String {
    let paragraphs = about.split("\n\n").map(|paragraph| {
        let end = if paragraph.ends_with(['.', '?', '!']) {
            ""
        } else {
            "."
        };
        text::wrap(&format!("{paragraph}{end}"), 0, width)
    });
    paragraphs.collect::<Vec<_>>().join("\n")
}

fn page_text(page: &Page, about: &str, width: usize) -> String {
    let usage = format!("--{} ", page.name);
    let indent = usage.chars().count();
    let grammar = page.grammar_lines(width.saturating_sub(indent + 2));
    let grammar = grammar.join(&format!("\n{}", " ".repeat(indent)));
    let mut out = format!(
        "Option of 'fanlight run':\n{usage}{grammar}\n\n{}",
        paragraphs(about, width)
    );
    if !page.entries.is_empty() {
        out += "\nValues:\n";
    }
    for entry in &page.entries {
        out += &format!("  {}\n{}", entry.term, text::wrap(&entry.text, 6, width));
        for (word, meaning) in &entry.words {
            out += &text::wrap(&format!("{word}: {meaning}"), 8, width);
        }
    }
    if !page.notes.is_empty() {
        out += &format!("\n{}", text::wrap(&page.notes.join(" "), 0, width));
    }
    out += "\nExamples:\n";
    for example in &page.examples {
        out += &format!("  {example}\n");
    }
    out += &format!("\nThe last example in a --config file:\n  {}\n", page.json);
    out
}

fn subcommand<'a>(root: &'a Command, words: &[String]) -> Option<&'a Command> {
    words.iter().try_fold(root, |command, word| {
        command
            .get_subcommands()
            .find(|command| command.get_name() == word && !command.is_hide_set())
    })
}

fn unknown(root: &Command, topic: &str) -> String {
    let topics = command::topics(root);
    let name = topic.trim_start_matches("--");
    let hint = nearest(name, topics.iter().map(String::as_str))
        .map_or(String::new(), |topic| format!("; did you mean {topic}?"));
    format!("help {topic}: no such command or option{hint}; see 'fanlight help'")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(topic: &str) -> Result<String, String> {
        let words: Vec<_> = topic.split_whitespace().map(str::to_owned).collect();
        super::on(&words)
    }

    #[test]
    fn commands_and_options_are_topics() {
        assert!(on("").unwrap().contains("Usage: fanlight <COMMAND>"));
        assert!(on("run").unwrap().contains("Exit status:"));
        assert!(on("vfio bind").unwrap().contains("--vfs"));
        for topic in ["disk", "--disk", "run disk", "run --disk"] {
            let text = on(topic).unwrap();
            assert!(
                text.contains("format=raw|qcow2") && text.contains("\"disk\":["),
                "{text}"
            );
        }
        assert!(on("log").unwrap().contains("FANLIGHT_LOG"));
        let both = on("vfio").unwrap();
        assert!(both.contains("fanlight vfio <COMMAND>") && both.contains("iommufd=auto|on|off"));
        assert!(!on("--vfio").unwrap().contains("fanlight vfio <COMMAND>"));
        assert_eq!(
            on("dsk").unwrap_err(),
            "help dsk: no such command or option; did you mean disk?; see 'fanlight help'"
        );
    }

    #[test]
    fn every_topic_fits_its_width() {
        for option in option_table::OPTIONS {
            for width in [60, 80, 100] {
                let text = page_text(&Page::new(option), "About.", width);
                let (head, _) = text.split_once("\nExamples").unwrap();
                for line in head.lines() {
                    assert!(line.chars().count() <= width, "{line}");
                }
            }
        }
    }
}
