//! The JSON schema of the configuration, as the text of help pages.

use std::sync::LazyLock;

use fanlight_api::VmConfig;
use serde_json::Value as Json;

/// A field, or a word of an enumeration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name of the field, or the word.
    pub name: String,
    /// What it means, as sentences.
    pub text: String,
    /// Whether the field must be given.
    pub required: bool,
    /// Words that the field takes, if it is an enumeration.
    pub words: Vec<Entry>,
}

static SCHEMA: LazyLock<Json> =
    LazyLock::new(|| schemars::schema_for!(VmConfig).as_value().clone());

/// The field of `VmConfig` for an option.
pub fn field(option: &str) -> Option<Entry> {
    let name = field_name(option);
    let property = SCHEMA["properties"].get(&name)?;
    Some(entry(&name, property, false))
}

/// Whether the option adds to a list.
pub fn is_list(option: &str) -> bool {
    SCHEMA["properties"][field_name(option)]["type"] == "array"
}

/// Fields of the object that an option describes; empty if it describes no object.
pub fn keys(option: &str) -> Vec<Entry> {
    let schema = target(&SCHEMA["properties"][field_name(option)]);
    let required = |name: &str| {
        let list = schema["required"].as_array();
        list.is_some_and(|list| list.iter().any(|one| one == name))
    };
    let properties = schema["properties"].as_object().into_iter().flatten();
    properties
        .map(|(name, property)| entry(name, property, required(name)))
        .collect()
}

/// Names of all fields of the configuration, as options.
#[cfg(test)]
pub fn options() -> Vec<String> {
    let properties = SCHEMA["properties"].as_object().into_iter().flatten();
    properties.map(|(name, _)| name.replace('_', "-")).collect()
}

/// The name of the field for an option.
pub fn field_name(option: &str) -> String {
    option.replace('-', "_")
}

fn entry(name: &str, property: &Json, required: bool) -> Entry {
    let text = description(property).or_else(|| description(target(property)));
    Entry {
        name: name.into(),
        text: text.unwrap_or_default() + &default(property),
        required,
        words: words(target(property)),
    }
}

/// The default value as a sentence, in the words of the command line.
fn default(property: &Json) -> String {
    let value = match &property["default"] {
        Json::Bool(true) => "on".into(),
        Json::Bool(false) => "off".into(),
        Json::Number(number) => number.to_string(),
        Json::String(text) => text.clone(),
        _ => return String::new(),
    };
    format!(" Default: {value}.")
}

fn description(schema: &Json) -> Option<String> {
    let text = schema["description"].as_str()?;
    // Code spans are for the API's reference; a terminal shows their text.
    Some(text.replace('\n', " ").replace('`', ""))
}

/// The schema behind a property: the target of its reference, the items of its list, or its type other than null.
fn target(property: &Json) -> &Json {
    if let Some(reference) = property["$ref"].as_str() {
        let name = reference.trim_start_matches("#/$defs/");
        return target(&SCHEMA["$defs"][name]);
    }
    if property["type"] == "array" {
        return target(&property["items"]);
    }
    let variants = property["anyOf"].as_array().into_iter().flatten();
    variants
        .filter(|schema| schema["type"] != "null")
        .map(target)
        .next()
        .unwrap_or(property)
}

/// Words of an enumeration: constants, and objects of one field.
fn words(schema: &Json) -> Vec<Entry> {
    let variants = schema["oneOf"].as_array().into_iter().flatten();
    variants
        .filter_map(|variant| {
            let object = variant["properties"].as_object();
            let name = match variant["const"].as_str() {
                Some(word) => word,
                None => object?.keys().next()?,
            };
            Some(Entry {
                name: name.into(),
                text: description(variant).unwrap_or_default(),
                required: false,
                words: Vec::new(),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_keys_and_words_have_texts() {
        assert!(is_list("disk") && !is_list("memory"));
        let keys = keys("disk");
        let path = keys.iter().find(|key| key.name == "path").unwrap();
        assert!(path.required && path.text.starts_with("Image file"));
        let format = keys.iter().find(|key| key.name == "format").unwrap();
        let words: Vec<_> = format.words.iter().map(|word| word.name.as_str()).collect();
        assert_eq!(words, ["raw", "qcow2"]);
        let words = field("console").unwrap().words;
        assert!(words.iter().any(|word| word.name == "socket"));
        assert_eq!(field("on-panic").unwrap().words.len(), 3);
    }
}
