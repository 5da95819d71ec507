//! Completions of values. The shells call the program itself; see `completion_scripts`.

use std::{ffi::OsStr, fs, path::Path};

use clap::builder::StyledStr;
use clap_complete::{
    CompletionCandidate,
    engine::{PathCompleter, ValueCompleter},
};
use fanlight_api::methods::METHODS;
use fanlight_devices::vfio::sysfs::HostFunction;

use crate::{
    log::LEVELS,
    option_schema::{self, Entry},
    option_table::{Form, OptionSpec, Value},
    vfio_bind,
};

/// A value and its text.
type Candidate = (String, String);

/// Completes values of an option of `fanlight run`.
pub fn option_value(option: &OptionSpec, current: &OsStr) -> Vec<CompletionCandidate> {
    let Some(current) = current.to_str() else {
        return Vec::new();
    };
    let candidates = match &option.form {
        Form::One(value) => {
            let words = option_schema::field(option.name).map_or(Vec::new(), |field| field.words);
            with_prefix("", values(*value, &words, current))
        }
        Form::Choice(choices) => choice(option, choices, current),
        Form::Keys(keys) => key_values(option, keys, current),
    };
    made(candidates)
}

/// Completes `word` or `word=value`.
fn choice(option: &OptionSpec, choices: &[(&str, Option<Value>)], current: &str) -> Vec<Candidate> {
    if let Some((word, value)) = current.split_once('=') {
        let kind = choices.iter().find(|(choice, _)| *choice == word);
        let Some((_, Some(kind))) = kind else {
            return Vec::new();
        };
        return with_prefix(&format!("{word}="), values(*kind, &[], value));
    }
    let words = option_schema::field(option.name).map_or(Vec::new(), |field| field.words);
    let text = |word: &str| {
        let entry = words.iter().find(|entry| entry.name == word);
        entry.map_or(String::new(), |entry| entry.text.clone())
    };
    let found = choices.iter().map(|(word, value)| {
        let equals = if value.is_some() { "=" } else { "" };
        (format!("{word}{equals}"), text(word))
    });
    found
        .filter(|(word, _)| word.starts_with(current))
        .collect()
}

/// Completes `key=value,key=value`.
fn key_values(option: &OptionSpec, keys: &[(&str, Value)], current: &str) -> Vec<Candidate> {
    let start = last_part(current);
    let (before, part) = current.split_at(start);
    let fields = option_schema::keys(option.name);
    let field = |key: &str| fields.iter().find(|field| field.name == key);
    if let Some((key, value)) = part.split_once('=') {
        let kind = keys.iter().find(|(name, _)| *name == key);
        let Some((_, kind)) = kind else {
            return Vec::new();
        };
        let words = field(key).map_or(&[][..], |field| &field.words);
        return with_prefix(&format!("{before}{key}="), values(*kind, words, value));
    }
    let used = |key: &str| {
        let bare = before
            .split(',')
            .next()
            .is_some_and(|first| !first.contains('='));
        let is_first = keys.first().is_some_and(|(first, _)| *first == key);
        let mut parts = before.split(',').filter_map(|part| part.split_once('='));
        !before.is_empty() && (bare && is_first || parts.any(|(other, _)| other == key))
    };
    let mut found: Vec<_> = keys
        .iter()
        .filter(|(key, _)| key.starts_with(part) && !used(key))
        .map(|(key, _)| {
            let text = field(key).map_or(String::new(), |field| field.text.clone());
            (format!("{before}{key}="), text)
        })
        .collect();
    if let (true, Some((key, value))) = (before.is_empty(), keys.first()) {
        let words = field(key).map_or(&[][..], |field| &field.words);
        found.extend(values(*value, words, part));
    }
    found
}

/// Where the last part of a list starts: behind the last comma that stands alone.
fn last_part(text: &str) -> usize {
    let mut start = 0;
    let mut bytes = text.bytes().enumerate().peekable();
    while let Some((at, byte)) = bytes.next() {
        if byte == b',' && bytes.next_if(|(_, next)| *next == b',').is_none() {
            start = at + 1;
        }
    }
    start
}

/// Values of a kind that begin with `current`.
fn values(kind: Value, words: &[Entry], current: &str) -> Vec<Candidate> {
    let plain = |words: &[&str]| words.iter().map(|word| (*word).into()).collect::<Vec<_>>();
    let found: Vec<String> = match kind {
        Value::File => return files(current),
        Value::Outputs => return outputs(current),
        Value::PciAddress => return starting(pci_functions(), current),
        Value::Word => {
            let words = words
                .iter()
                .map(|word| (word.name.clone(), word.text.clone()));
            return starting(words, current);
        }
        Value::Tap => taps(Path::new("/sys/class/net")),
        Value::Size => plain(&["256M", "512M", "1G", "2G", "4G", "8G"]),
        Value::HugePage => plain(&["2M", "1G"]),
        Value::Port => (1..=8).map(|port: u8| port.to_string()).collect(),
        Value::Cid => plain(&["3"]),
        Value::Switch => plain(&["on", "off"]),
        Value::Mac => plain(&["02:00:00:00:00:01"]),
        Value::Number | Value::Name | Value::Text => Vec::new(),
    };
    starting(found.into_iter().map(|word| (word, String::new())), current)
}

fn starting(words: impl IntoIterator<Item = Candidate>, current: &str) -> Vec<Candidate> {
    let words = words.into_iter();
    words
        .filter(|(word, _)| word.starts_with(current))
        .collect()
}

fn with_prefix(prefix: &str, candidates: Vec<Candidate>) -> Vec<Candidate> {
    let candidates = candidates.into_iter();
    candidates
        .map(|(word, text)| (format!("{prefix}{word}"), text))
        .collect()
}

fn files(current: &str) -> Vec<Candidate> {
    let found = PathCompleter::any().complete(OsStr::new(current));
    found
        .into_iter()
        .filter_map(|one| Some((one.get_value().to_str()?.to_owned(), String::new())))
        .collect()
}

/// Completes the last size of a list such as `1920x1080+1280x`.
fn outputs(current: &str) -> Vec<Candidate> {
    const SIZES: [&str; 6] = [
        "1280x800",
        "1280x1024",
        "1920x1080",
        "1920x1200",
        "2560x1440",
        "3840x2160",
    ];
    let start = current.rfind('+').map_or(0, |at| at + 1);
    let (before, part) = current.split_at(start);
    let sizes = SIZES.map(|size| (size.to_owned(), String::new()));
    with_prefix(before, starting(sizes, part))
}

/// Tap interfaces: those with flags of the TUN driver (Linux `drivers/net/tun.c`).
fn taps(class: &Path) -> Vec<String> {
    let interfaces = fs::read_dir(class).into_iter().flatten().flatten();
    let mut taps: Vec<_> = interfaces
        .filter(|interface| interface.path().join("tun_flags").exists())
        .filter_map(|interface| interface.file_name().into_string().ok())
        .collect();
    taps.sort();
    taps
}

/// Addresses of devices that can be passed through, with driver.
fn pci_functions() -> Vec<Candidate> {
    let functions = HostFunction::all().unwrap_or_default().into_iter();
    functions
        .filter(|function| !vfio_bind::is_bridge(function))
        .map(|function| (function.address.to_string(), vfio_bind::summary(&function)))
        .collect()
}

fn made(candidates: Vec<Candidate>) -> Vec<CompletionCandidate> {
    candidates
        .into_iter()
        .map(|(word, text)| {
            let help = (!text.is_empty()).then(|| StyledStr::from(text));
            CompletionCandidate::new(word).help(help)
        })
        .collect()
}

/// Completes PCI addresses of this host.
pub fn pci_addresses(current: &OsStr) -> Vec<CompletionCandidate> {
    made(starting(pci_functions(), &current.to_string_lossy()))
}

/// Completes methods of the control API.
pub fn methods(current: &OsStr) -> Vec<CompletionCandidate> {
    let methods = METHODS
        .iter()
        .map(|method| (method.name.to_owned(), method.description.trim().to_owned()));
    made(starting(methods, &current.to_string_lossy()))
}

/// Completes levels of the log.
pub fn log_levels(current: &OsStr) -> Vec<CompletionCandidate> {
    let levels = LEVELS.map(|level| (level.to_owned(), String::new()));
    made(starting(levels, &current.to_string_lossy()))
}
