//! Errors of the API: a stable kind and number, the field at fault, and a message for people.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

/// The kind of an error, for programs. Names and numbers stay the same between versions.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The line is not JSON.
    ParseError,
    /// The JSON is not a request, or too large to be one.
    InvalidRequest,
    /// There is no method of that name.
    UnknownMethod,
    /// The parameters do not fit the method.
    InvalidParams,
    /// A bug in Fanlight.
    Internal,
    /// The machine's state forbids it.
    WrongState,
    /// There is no such device, output or resource.
    NotFound,
    /// The name is taken.
    Exists,
    /// In use at the moment; it may work later.
    Busy,
    /// A descriptor is missing, or not of the kind that is needed.
    BadDescriptor,
    /// What was asked for cannot be on this machine or this host.
    BadInput,
    /// The host failed.
    HostFailure,
    /// The peer may not use this socket.
    Forbidden,
}

impl ErrorKind {
    /// The error's number in JSON-RPC.
    pub fn code(self) -> i32 {
        match self {
            ErrorKind::ParseError => -32700,
            ErrorKind::InvalidRequest => -32600,
            ErrorKind::UnknownMethod => -32601,
            ErrorKind::InvalidParams => -32602,
            ErrorKind::Internal => -32603,
            ErrorKind::WrongState => -32001,
            ErrorKind::NotFound => -32002,
            ErrorKind::Exists => -32003,
            ErrorKind::Busy => -32004,
            ErrorKind::BadDescriptor => -32005,
            ErrorKind::BadInput => -32006,
            ErrorKind::HostFailure => -32007,
            ErrorKind::Forbidden => -32008,
        }
    }
}

/// The part of an error for programs.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
pub struct ErrorData {
    /// The kind.
    pub kind: ErrorKind,
    /// The field at fault, such as `disk[0].path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// The valid name nearest to an unknown one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suggestion: Option<String>,
}

/// An error on the wire.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
pub struct ApiError {
    /// The number of the kind, in JSON-RPC.
    pub code: i32,
    /// One line for a person.
    pub message: String,
    /// The part for programs.
    pub data: ErrorData,
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

/// The longest message and field of an answer, in bytes.
const MAX_MESSAGE: usize = 2048;
const MAX_FIELD: usize = 256;

/// Shortens a text that is too long, and shows that.
fn clip(text: &mut String, most: usize) {
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most));
        text.push('…');
    }
}

impl ApiError {
    /// An error without field and suggestion.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            code: kind.code(),
            message: message.into(),
            data: ErrorData {
                kind,
                field: None,
                suggestion: None,
            },
        }
    }

    /// Names the field at fault.
    pub fn at(mut self, field: impl Into<String>) -> Self {
        self.data.field = Some(field.into());
        self
    }

    /// Limits the length of message and field, which may repeat input of the client.
    pub fn bounded(mut self) -> Self {
        clip(&mut self.message, MAX_MESSAGE);
        if let Some(field) = &mut self.data.field {
            clip(field, MAX_FIELD);
        }
        self
    }

    /// Suggests the name of `valid` that is nearest to `name`, if one is near.
    pub fn with_nearest<'a>(mut self, name: &str, valid: impl Iterator<Item = &'a str>) -> Self {
        if let Some(nearest) = nearest(name, valid) {
            self.message += &format!("; did you mean {nearest}?");
            self.data.suggestion = Some(nearest.to_owned());
        }
        self
    }
}

/// The name that a person who wrote `name` most likely meant.
pub fn nearest<'a>(name: &str, valid: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    /// Below this likeness, names have little in common.
    const ALIKE: f64 = 0.7;
    /// Longer names are not compared: comparison takes time, and no valid name is as long.
    const MAX_NAME: usize = 64;
    if name.len() > MAX_NAME {
        return None;
    }
    valid
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(likeness, _)| *likeness >= ALIKE)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate)
}

/// Reads `value` as a `T`; an error names the field, and for an unknown one the nearest that is known.
pub fn read<T: DeserializeOwned>(value: Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let text = error.inner().to_string();
        let mut result = ApiError::new(ErrorKind::InvalidParams, text.clone());
        if path != "." {
            result.message = format!("{path}: {text}");
            result = result.at(path);
        }
        match unknown_name(&text) {
            Some((name, valid)) => result.with_nearest(name, valid.into_iter()),
            None => result,
        }
    })
}

/// Parses serde's message about an unknown field or variant: the name, and the valid ones.
fn unknown_name(text: &str) -> Option<(&str, Vec<&str>)> {
    let rest = text
        .strip_prefix("unknown field `")
        .or_else(|| text.strip_prefix("unknown variant `"))?;
    let (name, rest) = rest.split_once('`')?;
    Some((name, rest.split('`').skip(1).step_by(2).collect()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::VmConfig;

    #[test]
    fn mistakes_name_the_field_and_the_nearest_name() {
        let error = read::<VmConfig>(json!({"disk": [{"pth": "a"}]})).unwrap_err();
        assert_eq!(error.code, -32602);
        assert_eq!(error.data.field.as_deref(), Some("disk[0].pth"));
        assert_eq!(error.data.suggestion.as_deref(), Some("path"));
        let error = read::<VmConfig>(json!({"cpus": "many"})).unwrap_err();
        assert_eq!(error.data.field.as_deref(), Some("cpus"));
        assert!(error.message.contains("invalid type"), "{error}");
        let error = read::<VmConfig>(json!({"on_reset": "restrt"})).unwrap_err();
        assert_eq!(error.data.suggestion.as_deref(), Some("restart"));
    }

    #[test]
    fn what_is_repeated_is_bounded() {
        let error =
            ApiError::new(ErrorKind::BadInput, "ä".repeat(MAX_MESSAGE)).at("x".repeat(1000));
        let error = error.bounded();
        assert_eq!(error.message.len(), MAX_MESSAGE + '…'.len_utf8());
        assert_eq!(error.data.field.unwrap().chars().count(), MAX_FIELD + 1);
        let short = ApiError::new(ErrorKind::BadInput, "short").at("x");
        assert_eq!(short.clone().bounded(), short);
    }

    #[test]
    fn nothing_like_it_suggests_nothing() {
        assert_eq!(nearest("zzz", ["path", "cpus"].into_iter()), None);
        assert_eq!(nearest(&"p".repeat(1000), ["path"].into_iter()), None);
    }
}
