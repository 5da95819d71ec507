//! `fanlight man`: the manual pages, one for the program and one for each command.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use clap::Command;
use clap_mangen::{
    Man,
    roff::{Inline, Roff, bold, italic, roman},
};
use thiserror::Error;

use crate::{command, option_page::Page, option_table::OPTIONS};

/// A page cannot be written.
#[derive(Debug, Error)]
#[error("{}: cannot write the manual page; give an existing directory", path.display())]
pub struct ManError {
    path: PathBuf,
    source: io::Error,
}

/// Files that Fanlight uses, for the page of the program.
const FILES: &[(&str, &str)] = &[
    (
        "/dev/kvm",
        "The hypervisor. Users need permission to read and write it.",
    ),
    ("/dev/net/tun", "Opens tap interfaces, for --net."),
    (
        "/dev/vhost-net",
        "Moves the packets of network devices in the kernel.",
    ),
    ("/dev/vhost-vsock", "Serves socket devices, for --vsock."),
    ("/dev/udmabuf", "Exports guest RAM as dma-bufs, for --gpu."),
    (
        "/dev/iommu, /dev/vfio/",
        "Map DMA and open devices, for --vfio.",
    ),
];

const ENVIRONMENT: &[(&str, &str)] = &[(
    "FANLIGHT_LOG",
    "Log level where --log is not given. 'fanlight help log' describes the values.",
)];

/// Writes all pages into a directory. Returns their paths.
pub fn write(directory: &Path) -> Result<Vec<PathBuf>, ManError> {
    let mut paths = Vec::new();
    for (name, page) in pages() {
        let path = directory.join(format!("{name}.1"));
        fs::write(&path, page).map_err(|source| ManError {
            path: path.clone(),
            source,
        })?;
        paths.push(path);
    }
    Ok(paths)
}

/// Names and texts of all pages.
fn pages() -> Vec<(String, Vec<u8>)> {
    // The section VALUES has the grammars.
    let mut root = command::plain();
    root.build();
    let mut pages = Vec::new();
    add_pages(&root, "fanlight", "fanlight", &mut pages);
    pages
}

/// Adds the page of a command and of its subcommands. `typed` is what a user types.
fn add_pages(command: &Command, name: &str, typed: &str, pages: &mut Vec<(String, Vec<u8>)>) {
    pages.push((name.into(), page(command, name, typed)));
    for subcommand in visible(command) {
        let part = subcommand.get_name();
        add_pages(
            subcommand,
            &format!("{name}-{part}"),
            &format!("{typed} {part}"),
            pages,
        );
    }
}

fn visible(command: &Command) -> impl Iterator<Item = &Command> {
    command
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
}

fn page(command: &Command, name: &str, typed: &str) -> Vec<u8> {
    let more = command.get_after_long_help().or(command.get_after_help());
    let more = more.map_or(String::new(), ToString::to_string);
    // Sections of our own replace the help's last part. A heading ends with a colon.
    let mut sections = Roff::new();
    if name == "fanlight-run" {
        values(&mut sections);
    }
    notes(&mut sections, &more);
    if name == "fanlight" {
        list(&mut sections, "FILES", FILES);
    }
    if has_log(command) || name == "fanlight" {
        list(&mut sections, "ENVIRONMENT", ENVIRONMENT);
    }
    see_also(&mut sections, command, name);
    let renamed = command
        .clone()
        .name(name.to_owned())
        .bin_name(typed.to_owned());
    let man = Man::new(renamed).title(name).manual("Fanlight");
    let mut text = Vec::new();
    // A vector takes every write.
    let _ = man.render_title(&mut text);
    let _ = man.render_name_section(&mut text);
    let _ = man.render_synopsis_section(&mut text);
    let _ = man.render_description_section(&mut text);
    if command.get_arguments().next().is_some() {
        let _ = man.render_options_section(&mut text);
    }
    if visible(command).next().is_some() {
        let _ = man.render_subcommands_section(&mut text);
    }
    let _ = sections.to_writer(&mut text);
    text
}

fn has_log(command: &Command) -> bool {
    command
        .get_arguments()
        .any(|arg| arg.get_long() == Some("log"))
}

fn list(roff: &mut Roff, heading: &str, entries: &[(&str, &str)]) {
    roff.control("SH", [heading]);
    for (term, text) in entries {
        roff.control("TP", [])
            .text([bold(*term)])
            .text([roman(*text)]);
    }
}

/// Keys and words of the options of `fanlight run`.
fn values(roff: &mut Roff) {
    roff.control("SH", ["VALUES"]);
    for option in OPTIONS {
        let page = Page::new(option);
        if page.entries.is_empty() {
            continue;
        }
        let name = format!("--{}", page.name);
        roff.control("SS", [name.as_str()]);
        roff.text([roman(page.grammar.concat())]);
        for entry in &page.entries {
            roff.control("TP", []).text([bold(entry.term.clone())]);
            roff.text([roman(entry.text.clone())]);
            for (word, meaning) in &entry.words {
                roff.control("br", []);
                roff.text([italic(word.clone()), roman(format!(": {meaning}"))]);
            }
        }
        if !page.notes.is_empty() {
            roff.control("PP", []).text([roman(page.notes.join(" "))]);
        }
        roff.control("PP", []).text([roman("Examples:")]);
        verbatim(roff, page.examples.iter().map(String::as_str));
        roff.control("PP", [])
            .text([roman("The last example in a --config file:")]);
        verbatim(roff, [page.json.as_str()]);
    }
}

fn verbatim<'a>(roff: &mut Roff, lines: impl IntoIterator<Item = &'a str>) {
    roff.control("RS", ["4"]).control("nf", []);
    for line in lines {
        roff.text([roman(line)]);
    }
    roff.control("fi", []).control("RE", []);
}

/// The last part of a help: sections of indented lines under a heading with a colon, and paragraphs.
fn notes(roff: &mut Roff, text: &str) {
    let blocks: Vec<&str> = text
        .split("\n\n")
        .filter(|block| !block.is_empty())
        .collect();
    let (sections, paragraphs): (Vec<_>, Vec<_>) = blocks
        .into_iter()
        .partition(|block| block.lines().next().is_some_and(|line| line.ends_with(':')));
    if !paragraphs.is_empty() {
        roff.control("SH", ["NOTES"]);
    }
    for paragraph in paragraphs {
        roff.control("PP", []);
        roff.text([roman(paragraph.replace('\n', " "))]);
    }
    for section in sections {
        let (heading, lines) = section.split_once('\n').unwrap_or((section, ""));
        let heading = heading.trim_end_matches(':').to_uppercase();
        roff.control("SH", [heading.as_str()]);
        verbatim(
            roff,
            lines
                .lines()
                .map(|line| line.strip_prefix("  ").unwrap_or(line)),
        );
    }
}

fn see_also(roff: &mut Roff, command: &Command, name: &str) {
    let mut others: Vec<String> = visible(command)
        .map(|command| format!("{name}-{}", command.get_name()))
        .collect();
    if let Some((parent, _)) = name.rsplit_once('-') {
        others.insert(0, parent.into());
    }
    roff.control("SH", ["SEE ALSO"]);
    let mut line: Vec<Inline> = Vec::new();
    for (index, other) in others.iter().enumerate() {
        if index != 0 {
            line.push(roman(", "));
        }
        line.push(bold(other.clone()));
        line.push(roman("(1)"));
    }
    roff.text(line);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page() {
        let pages = pages();
        let names: Vec<_> = pages.iter().map(|(name, _)| name.as_str()).collect();
        for name in [
            "fanlight",
            "fanlight-run",
            "fanlight-vfio-bind",
            "fanlight-man",
        ] {
            assert!(names.contains(&name), "{names:?}");
        }
        assert!(
            !names.iter().any(|name| name.contains("renderer")),
            "{names:?}"
        );
        let text = |name: &str| {
            let (_, page) = pages.iter().find(|(other, _)| other == name).unwrap();
            String::from_utf8(page.clone()).unwrap()
        };
        let run = text("fanlight-run");
        for part in [
            ".SH \"EXIT STATUS\"",
            ".SH EXAMPLES",
            ".SH VALUES",
            "format=raw|qcow2",
            ".SH ENVIRONMENT",
        ] {
            assert!(run.contains(part), "{part} in {run}");
        }
        assert!(text("fanlight").contains(".SH FILES"));
        assert!(text("fanlight-ctl").contains(".SH \"EXIT STATUS\""));
    }

    #[test]
    fn pages_are_written_into_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(write(dir.path()).unwrap().len(), pages().len());
        assert!(dir.path().join("fanlight-run.1").exists());
        let error = write(&dir.path().join("none")).unwrap_err();
        assert!(error.to_string().contains("give an existing directory"));
    }
}
