//! Messages of JSON-RPC 2.0.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, value::RawValue};

use crate::error::{ApiError, ErrorKind};

/// The most requests in one batch.
pub const MAX_BATCH: usize = 64;

/// The id that a client gives its request.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Id {
    /// A number.
    Number(serde_json::Number),
    /// Text.
    Text(String),
    /// Null: for errors about a request that could not be read.
    Null,
}

/// A request, or a notification if it has no id.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The id for the answer.
    pub id: Option<Id>,
    /// The method's name.
    pub method: String,
    /// Its parameters, by name.
    pub params: Value,
}

/// The content of a line. An invalid request comes as the error to answer it with.
#[derive(Debug)]
pub enum Incoming {
    /// One request.
    Single(Result<Request, (Id, ApiError)>),
    /// Several, in one array.
    Batch(Vec<Result<Request, (Id, ApiError)>>),
}

impl Incoming {
    /// Reads a line.
    pub fn read(line: &[u8]) -> Self {
        let invalid = |kind, text: String| Self::Single(Err((Id::Null, ApiError::new(kind, text))));
        match serde_json::from_slice(line) {
            Err(error) => invalid(ErrorKind::ParseError, format!("not JSON: {error}")),
            Ok(Value::Array(requests)) if requests.is_empty() => {
                invalid(ErrorKind::InvalidRequest, "an empty batch".into())
            }
            Ok(Value::Array(requests)) if requests.len() > MAX_BATCH => invalid(
                ErrorKind::InvalidRequest,
                format!(
                    "{} requests in a batch: at most {MAX_BATCH}",
                    requests.len()
                ),
            ),
            Ok(Value::Array(requests)) => {
                Self::Batch(requests.into_iter().map(Request::read).collect())
            }
            Ok(value) => Self::Single(Request::read(value)),
        }
    }
}

impl Request {
    fn read(value: Value) -> Result<Self, (Id, ApiError)> {
        let Value::Object(mut object) = value else {
            let error = ApiError::new(ErrorKind::InvalidRequest, "a request is a JSON object");
            return Err((Id::Null, error));
        };
        let id = match object.remove("id") {
            None => None,
            Some(Value::Number(number)) => Some(Id::Number(number)),
            Some(Value::String(text)) => Some(Id::Text(text)),
            Some(Value::Null) => Some(Id::Null),
            Some(_) => {
                let error =
                    ApiError::new(ErrorKind::InvalidRequest, "an id is a number, text or null");
                return Err((Id::Null, error.at("id")));
            }
        };
        let invalid = |field: &str, text: &str| {
            let error = ApiError::new(ErrorKind::InvalidRequest, text).at(field);
            (id.clone().unwrap_or(Id::Null), error)
        };
        if object.remove("jsonrpc") != Some(Value::String("2.0".into())) {
            return Err(invalid("jsonrpc", "a request has \"jsonrpc\": \"2.0\""));
        }
        let Some(Value::String(method)) = object.remove("method") else {
            return Err(invalid("method", "a request names its method"));
        };
        let params = match object.remove("params") {
            None => Value::Object(Map::new()),
            Some(params @ Value::Object(_)) => params,
            Some(_) => return Err(invalid("params", "parameters are an object, by name")),
        };
        if let Some(field) = object.keys().next() {
            return Err(invalid(
                field,
                &format!("a request has no {field:?}: only jsonrpc, id, method and params"),
            ));
        }
        Ok(Self { id, method, params })
    }
}

/// An answer.
#[derive(Debug, Deserialize, Serialize)]
pub struct Response {
    /// `2.0`.
    pub jsonrpc: String,
    /// The id of the request.
    pub id: Id,
    /// The result of the method.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Box<RawValue>>,
    /// Why there is no result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ApiError>,
}

impl Response {
    /// The answer to request `id`.
    pub fn new(id: Id, outcome: Result<Box<RawValue>, ApiError>) -> Self {
        let (result, error) = match outcome {
            Ok(result) => (Some(result), None),
            Err(error) => (None, Some(error)),
        };
        Self {
            jsonrpc: "2.0".into(),
            id,
            result,
            error,
        }
    }
}

/// A message as a line. It cannot fail: the types of this crate have text for keys.
pub fn line(message: &impl Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(message).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn single(text: &str) -> Result<Request, (Id, ApiError)> {
        match Incoming::read(text.as_bytes()) {
            Incoming::Single(request) => request,
            Incoming::Batch(_) => panic!("{text} is no batch"),
        }
    }

    #[test]
    fn requests_and_notifications_are_read() {
        let request =
            single(r#"{"jsonrpc":"2.0","id":"a","method":"m","params":{"x":1}}"#).unwrap();
        assert_eq!(request.id, Some(Id::Text("a".into())));
        assert_eq!(request.params["x"], 1);
        let request = single(r#"{"jsonrpc":"2.0","method":"m"}"#).unwrap();
        assert_eq!(request.id, None);
        assert!(matches!(Incoming::read(b"[1]"), Incoming::Batch(all) if all.len() == 1));
    }

    #[test]
    fn what_is_no_request_is_told_why() {
        for (text, kind, field) in [
            ("{", ErrorKind::ParseError, None),
            ("[]", ErrorKind::InvalidRequest, None),
            ("3", ErrorKind::InvalidRequest, None),
            (
                r#"{"method":"m"}"#,
                ErrorKind::InvalidRequest,
                Some("jsonrpc"),
            ),
            (
                r#"{"jsonrpc":"2.0","id":1}"#,
                ErrorKind::InvalidRequest,
                Some("method"),
            ),
            (
                r#"{"jsonrpc":"2.0","id":[],"method":"m"}"#,
                ErrorKind::InvalidRequest,
                Some("id"),
            ),
            (
                r#"{"jsonrpc":"2.0","method":"m","params":[1]}"#,
                ErrorKind::InvalidRequest,
                Some("params"),
            ),
            (
                r#"{"jsonrpc":"2.0","method":"m","parms":{}}"#,
                ErrorKind::InvalidRequest,
                Some("parms"),
            ),
        ] {
            let (_, error) = single(text).unwrap_err();
            assert_eq!(error.data.kind, kind, "{text}");
            assert_eq!(error.data.field.as_deref(), field, "{text}");
        }
        let many = format!("[{}]", vec!["1"; MAX_BATCH + 1].join(","));
        assert!(single(&many).is_err());
    }
}
