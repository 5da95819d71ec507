//! The page of an option of `fanlight run`: grammar, keys, examples and JSON form.

use serde_json::{Map, Value as Json, json};

use crate::{
    option_schema::{self, Entry},
    option_table::{Form, OptionSpec, Value},
};

/// The page of an option, apart from its layout.
pub struct Page {
    /// Name without the dashes.
    pub name: &'static str,
    /// The grammar of the value, in pieces between which a line can break.
    pub grammar: Vec<String>,
    /// Keys, or words, and their texts.
    pub entries: Vec<PageEntry>,
    /// Sentences on the form of the value.
    pub notes: Vec<&'static str>,
    /// Command lines.
    pub examples: Vec<String>,
    /// The last example as a configuration file.
    pub json: String,
}

/// A key with its values, or a word.
pub struct PageEntry {
    /// Such as `readonly=on|off`.
    pub term: String,
    /// What it means.
    pub text: String,
    /// Words that the key takes, and their texts.
    pub words: Vec<(String, String)>,
}

impl Page {
    /// The page of an option.
    pub fn new(option: &OptionSpec) -> Self {
        let last = option.examples.last().copied().unwrap_or_default();
        Self {
            name: option.name,
            grammar: grammar(option),
            entries: entries(option),
            notes: notes(option),
            examples: option
                .examples
                .iter()
                .map(|value| format!("--{} {}", option.name, quoted(value)))
                .collect(),
            json: json_form(option, last).map_or(String::new(), |json| json.to_string()),
        }
    }

    /// The grammar in lines of at most `width` columns, where its pieces allow.
    pub fn grammar_lines(&self, width: usize) -> Vec<String> {
        let mut lines = vec![String::new()];
        for piece in &self.grammar {
            let line = lines.last_mut().filter(|line| {
                line.is_empty() || line.chars().count() + piece.chars().count() <= width
            });
            match line {
                Some(line) => line.push_str(piece),
                None => lines.push(piece.trim_start().to_owned()),
            }
        }
        lines
    }
}

fn quoted(value: &str) -> String {
    if value.contains(' ') {
        format!("\"{value}\"")
    } else {
        value.to_owned()
    }
}

/// The values of a key: its words, or a placeholder.
fn values(value: Value, words: &[Entry]) -> String {
    match value {
        Value::Word => {
            let words: Vec<_> = words.iter().map(|word| word.name.as_str()).collect();
            words.join("|")
        }
        other => other.placeholder().to_owned(),
    }
}

fn grammar(option: &OptionSpec) -> Vec<String> {
    match &option.form {
        Form::One(value) => {
            let words = option_schema::field(option.name).map_or(Vec::new(), |field| field.words);
            vec![values(*value, &words)]
        }
        Form::Choice(choices) => choices
            .iter()
            .enumerate()
            .map(|(index, (word, value))| {
                let separator = if index == 0 { "" } else { " | " };
                match value {
                    Some(value) => format!("{separator}{word}={}", value.placeholder()),
                    None => format!("{separator}{word}"),
                }
            })
            .collect(),
        Form::Keys(keys) => {
            let fields = option_schema::keys(option.name);
            let piece = |(index, (key, value)): (usize, &(&str, Value))| {
                let field = fields.iter().find(|field| field.name == *key);
                let words = field.map_or(&[][..], |field| &field.words);
                let values = values(*value, words);
                match (index, field.is_some_and(|field| field.required)) {
                    (0, true) => format!("[{key}=]{values}"),
                    (0, false) => format!("[[{key}=]{values}]"),
                    (_, true) => format!(",{key}={values}"),
                    (_, false) => format!("[,{key}={values}]"),
                }
            };
            keys.iter().enumerate().map(piece).collect()
        }
    }
}

fn entries(option: &OptionSpec) -> Vec<PageEntry> {
    let field = option_schema::field(option.name);
    let words = field.map_or(Vec::new(), |field| field.words);
    match &option.form {
        Form::One(Value::Word) => words.into_iter().map(word_entry).collect(),
        Form::One(_) => Vec::new(),
        Form::Choice(choices) => choices
            .iter()
            .map(|(word, value)| {
                let entry = words.iter().find(|entry| entry.name == *word);
                PageEntry {
                    term: match value {
                        Some(value) => format!("{word}={}", value.placeholder()),
                        None => (*word).to_owned(),
                    },
                    text: entry.map_or(String::new(), |entry| entry.text.clone()),
                    words: Vec::new(),
                }
            })
            .collect(),
        Form::Keys(keys) => {
            let fields = option_schema::keys(option.name);
            let entry = |(key, value): &(&str, Value)| {
                let field = fields.iter().find(|field| field.name == *key)?;
                let required = if field.required { " Required." } else { "" };
                Some(PageEntry {
                    term: format!("{key}={}", values(*value, &field.words)),
                    text: format!("{}{required}", field.text),
                    words: field
                        .words
                        .iter()
                        .filter(|_| *value == Value::Word)
                        .map(|word| (word.name.clone(), word.text.clone()))
                        .collect(),
                })
            };
            keys.iter().filter_map(entry).collect()
        }
    }
}

fn word_entry(word: Entry) -> PageEntry {
    PageEntry {
        term: word.name,
        text: word.text,
        words: Vec::new(),
    }
}

fn notes(option: &OptionSpec) -> Vec<&'static str> {
    let mut notes = Vec::new();
    let values: Vec<Value> = match &option.form {
        Form::One(value) => vec![*value],
        Form::Choice(_) => Vec::new(),
        Form::Keys(keys) => keys.iter().map(|(_, value)| *value).collect(),
    };
    if let Form::Keys([_, _, ..]) = option.form {
        notes.push("Write a comma within a value twice.");
    }
    if values
        .iter()
        .any(|value| matches!(value, Value::Size | Value::HugePage))
    {
        notes.push("SIZE is a number of bytes, or one with K, M, G or T (powers of 1024).");
    }
    if values.iter().any(|value| value.takes_descriptor()) {
        notes.push(
            "In place of FILE, TAP or ADDRESS, fd:N is an open descriptor that Fanlight inherited. \
             In JSON it is {\"fd\": N}.",
        );
    }
    if option_schema::is_list(option.name) {
        notes.push("The option may be repeated. Each one adds a device.");
    }
    notes
}

/// The configuration that a value gives, with the fields that the value names.
fn json_form(option: &OptionSpec, value: &str) -> Option<Json> {
    let mut json = (option.read)(value).ok()?;
    if let (Form::Keys(keys), Json::Object(fields)) = (&option.form, &mut json) {
        let first = keys.first().map(|(key, _)| *key);
        let given: Vec<_> = value
            .split(',')
            .filter_map(|part| part.split_once('=').map_or(first, |(key, _)| Some(key)))
            .collect();
        fields.retain(|key, _| given.contains(&key.as_str()));
    }
    if option_schema::is_list(option.name) {
        json = json!([json]);
    }
    let field = option_schema::field_name(option.name);
    Some(Json::Object(Map::from_iter([(field, json)])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::option_table::{self, OPTIONS};

    #[test]
    fn a_page_has_the_grammar_the_keys_and_the_json() {
        let page = Page::new(option_table::find("--disk").unwrap());
        assert_eq!(
            page.grammar.concat(),
            "[path=]FILE[,readonly=on|off][,format=raw|qcow2][,serial=TEXT][,id=NAME][,port=N]"
        );
        let lines = page.grammar_lines(40);
        assert!(lines.iter().all(|line| line.len() <= 40), "{lines:?}");
        assert_eq!(lines.concat(), page.grammar.concat());
        assert_eq!(
            page.json,
            r#"{"disk":[{"format":"qcow2","path":"disk.qcow2","readonly":true}]}"#
        );
    }

    #[test]
    fn every_field_of_the_configuration_is_an_option() {
        let mut documented: Vec<_> = OPTIONS
            .iter()
            .map(|option| option.name.to_owned())
            .collect();
        documented.sort();
        assert_eq!(documented, option_schema::options());
    }

    #[test]
    fn every_key_is_documented_and_no_other() {
        for option in OPTIONS {
            let mut fields: Vec<_> = option_schema::keys(option.name)
                .into_iter()
                .map(|field| field.name)
                .collect();
            let field = option_schema::field(option.name).unwrap();
            let mut documented: Vec<String> = match &option.form {
                Form::One(Value::Word) => {
                    assert!(!field.words.is_empty(), "{}", option.name);
                    Vec::new()
                }
                Form::One(_) => Vec::new(),
                Form::Choice(choices) => {
                    fields = field.words.into_iter().map(|word| word.name).collect();
                    choices.iter().map(|(word, _)| (*word).into()).collect()
                }
                Form::Keys(keys) => keys.iter().map(|(key, _)| (*key).into()).collect(),
            };
            fields.sort();
            documented.sort();
            assert_eq!(documented, fields, "{}", option.name);
            for entry in Page::new(option).entries {
                assert!(entry.text.ends_with('.'), "{}: {}", option.name, entry.text);
            }
        }
    }

    /// A value of each kind that parses.
    fn sample(value: Value, words: &[Entry]) -> String {
        match value {
            Value::Word => words[0].name.clone(),
            Value::File | Value::Tap | Value::Text | Value::Name => "a".into(),
            Value::PciAddress => "0000:03:00.1".into(),
            Value::Mac => "02:00:00:00:00:01".into(),
            Value::Size | Value::HugePage => "2M".into(),
            Value::Number | Value::Port | Value::Cid => "3".into(),
            Value::Switch => "on".into(),
            Value::Outputs => "800x600+640x480".into(),
        }
    }

    #[test]
    fn every_documented_key_and_example_parses() {
        for option in OPTIONS {
            for example in option.examples {
                let json = json_form(option, example).unwrap().to_string();
                let config = serde_json::from_str::<fanlight_api::VmConfig>(&json);
                assert!(config.is_ok(), "--{} {example}: {config:?}", option.name);
            }
            if let Form::Keys(keys) = &option.form {
                let fields = option_schema::keys(option.name);
                let pairs: Vec<_> = keys
                    .iter()
                    .map(|(key, value)| {
                        let field = fields.iter().find(|field| field.name == *key).unwrap();
                        format!("{key}={}", sample(*value, &field.words))
                    })
                    .collect();
                let all = (option.read)(&pairs.join(","));
                assert!(all.is_ok(), "--{} {pairs:?}: {all:?}", option.name);
                let (first, rest) = pairs.split_first().unwrap();
                let bare = first.split_once('=').unwrap().1;
                assert!((option.read)(&[&[bare.to_owned()], rest].concat().join(",")).is_ok());
            }
        }
    }
}
