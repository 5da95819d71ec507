//! A name or an open descriptor: `"disk.img"`, or `{"fd": 0}`.

use std::{borrow::Cow, fmt, marker::PhantomData, path::PathBuf, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, MapAccess},
};

/// A name, or an open descriptor.
///
/// As text, `fd:N` is a descriptor. A file of that name is written `./fd:N`. In an API message, N is the index
/// of a descriptor that came with the message. On the command line and in a `--config` file, N is a descriptor
/// that the process inherited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OrFd<T> {
    /// Opened by its name.
    Named(T),
    /// An open descriptor.
    Fd(u32),
}

/// A path, or an open descriptor.
pub type PathOrFd = OrFd<PathBuf>;

impl<T: From<String>> From<String> for OrFd<T> {
    fn from(text: String) -> Self {
        match text.strip_prefix("fd:").map(str::parse) {
            Some(Ok(number)) => Self::Fd(number),
            _ => Self::Named(text.into()),
        }
    }
}

impl<T: From<String>> From<&str> for OrFd<T> {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl<T: From<String>> FromStr for OrFd<T> {
    type Err = std::convert::Infallible;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(text.into())
    }
}

impl fmt::Display for PathOrFd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(path) => path.display().fmt(f),
            Self::Fd(number) => write!(f, "fd:{number}"),
        }
    }
}

impl fmt::Display for OrFd<String> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(name) => f.write_str(name),
            Self::Fd(number) => write!(f, "fd:{number}"),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fd {
    fd: u32,
}

impl<T: Serialize> Serialize for OrFd<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Named(name) => name.serialize(serializer),
            Self::Fd(fd) => Fd { fd: *fd }.serialize(serializer),
        }
    }
}

impl<'de, T: From<String>> Deserialize<'de> for OrFd<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor<T>(PhantomData<T>);
        impl<'de, T: From<String>> de::Visitor<'de> for Visitor<T> {
            type Value = OrFd<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name, or a descriptor such as {\"fd\": 0}")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<OrFd<T>, E> {
                Ok(text.into())
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<OrFd<T>, A::Error> {
                let fd = Fd::deserialize(de::value::MapAccessDeserializer::new(map))?;
                Ok(OrFd::Fd(fd.fd))
            }
        }
        deserializer.deserialize_any(Visitor(PhantomData))
    }
}

impl<T> JsonSchema for OrFd<T> {
    fn schema_name() -> Cow<'static, str> {
        "NameOrDescriptor".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A name, or the index of a descriptor that comes with the message.",
            "oneOf": [
                {"type": "string"},
                {
                    "type": "object",
                    "properties": {"fd": {"type": "integer", "minimum": 0}},
                    "required": ["fd"],
                    "additionalProperties": false
                }
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_descriptors_are_told_apart() {
        let read = |json| serde_json::from_str::<PathOrFd>(json).unwrap();
        assert_eq!(read(r#""a/b""#), OrFd::Named("a/b".into()));
        assert_eq!(read(r#""fd:3""#), OrFd::Fd(3));
        assert_eq!(read(r#""fd:x""#), OrFd::Named("fd:x".into()));
        assert_eq!(read(r#"{"fd": 3}"#), OrFd::Fd(3));
        assert_eq!(
            serde_json::to_string(&read("{\"fd\":3}")).unwrap(),
            r#"{"fd":3}"#
        );
        for bad in [r#"{"fd": -1}"#, r#"{"path": "a"}"#, "3", "null"] {
            assert!(serde_json::from_str::<PathOrFd>(bad).is_err(), "{bad}");
        }
    }
}
