//! The `key=value,key=value` form of the command line as a serde format. The keys of an option are the fields
//! of its configuration type.
//!
//! Values are text. Booleans are `on` or `off`. A comma within a value is written twice.

use serde::{
    Deserializer,
    de::{self, DeserializeOwned, Error as _, IntoDeserializer, value::MapDeserializer},
    forward_to_deserialize_any,
};
use thiserror::Error;

use crate::error::nearest;

/// Why the text does not describe the configuration.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub struct SpecError(String);

impl de::Error for SpecError {
    fn custom<T: std::fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        let hint = nearest(field, expected.iter().copied())
            .map_or(String::new(), |key| format!("; did you mean {key}?"));
        Self(format!(
            "unknown key {field:?}{hint}; keys are {}",
            expected.join(", ")
        ))
    }

    fn missing_field(field: &'static str) -> Self {
        Self(format!("the key {field} is missing"))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self(format!("{variant:?} is not one of {}", expected.join(", ")))
    }
}

/// Reads `text` as a `T`. A first part without `=` is the value of `first_key`, if there is one.
pub fn parse<T: DeserializeOwned>(text: &str, first_key: Option<&str>) -> Result<T, SpecError> {
    let mut pairs: Vec<(String, Value)> = Vec::new();
    for (index, part) in split(text).into_iter().enumerate() {
        let (key, text) = match (part.split_once('='), first_key) {
            (Some((key, value)), _) => (key.to_owned(), value.to_owned()),
            (None, Some(first)) if index == 0 => (first.to_owned(), part),
            _ => return Err(SpecError(format!("{part:?} is not of the form key=value"))),
        };
        if pairs.iter().any(|(other, _)| *other == key) {
            return Err(SpecError(format!("the key {key} is given twice")));
        }
        let value = Value {
            key: key.clone(),
            text,
        };
        pairs.push((key, value));
    }
    T::deserialize(MapDeserializer::new(pairs.into_iter()))
}

/// Splits at single commas; a double comma stands for one.
fn split(text: &str) -> Vec<String> {
    let mut parts = Vec::new();
    let mut part = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(std::mem::take(&mut part));
        } else {
            part.push(c);
        }
    }
    parts.push(part);
    parts
}

/// A value, read as the type of its field.
struct Value {
    key: String,
    text: String,
}

impl Value {
    /// Names the key in an error.
    fn named(&self) -> impl Fn(SpecError) -> SpecError + use<> {
        let key = self.key.clone();
        move |SpecError(text)| SpecError(format!("{key}: {text}"))
    }
}

impl<'de> IntoDeserializer<'de, SpecError> for Value {
    type Deserializer = Self;
    fn into_deserializer(self) -> Self {
        self
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident $type:ty),* $(,)?) => {$(
        fn $method<V: de::Visitor<'de>>(self, visitor: V) -> Result<V::Value, SpecError> {
            let named = self.named();
            let number = self.text.parse::<$type>().map_err(|_| {
                named(SpecError::custom(format_args!(
                    "{:?} is not a number from {} to {}", self.text, <$type>::MIN, <$type>::MAX
                )))
            })?;
            visitor.$visit(number).map_err(named)
        }
    )*};
}

impl<'de> Deserializer<'de> for Value {
    type Error = SpecError;

    fn deserialize_any<V: de::Visitor<'de>>(self, visitor: V) -> Result<V::Value, SpecError> {
        let named = self.named();
        visitor.visit_string(self.text).map_err(named)
    }

    fn deserialize_bool<V: de::Visitor<'de>>(self, visitor: V) -> Result<V::Value, SpecError> {
        match self.text.as_str() {
            "on" => visitor.visit_bool(true),
            "off" => visitor.visit_bool(false),
            other => Err(self.named()(SpecError(format!(
                "{other:?} is neither on nor off"
            )))),
        }
    }

    fn deserialize_option<V: de::Visitor<'de>>(self, visitor: V) -> Result<V::Value, SpecError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: de::Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, SpecError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: de::Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, SpecError> {
        let named = self.named();
        visitor
            .visit_enum(self.text.into_deserializer())
            .map_err(named)
    }

    numbers!(deserialize_u8 visit_u8 u8, deserialize_u16 visit_u16 u16, deserialize_u32 visit_u32 u32, deserialize_u64 visit_u64 u64);

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        seq tuple tuple_struct map struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;
    use crate::ByteSize;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Example {
        path: PathBuf,
        #[serde(default)]
        readonly: bool,
        size: Option<ByteSize>,
        count: Option<u16>,
        kind: Option<Kind>,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(rename_all = "lowercase")]
    enum Kind {
        Raw,
    }

    fn error(text: &str) -> String {
        parse::<Example>(text, Some("path"))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn every_type_reads_from_text() {
        let got: Example =
            parse("a,,b,readonly=on,size=2M,count=7,kind=raw", Some("path")).unwrap();
        assert_eq!(
            got,
            Example {
                path: "a,b".into(),
                readonly: true,
                size: Some(ByteSize(2 << 20)),
                count: Some(7),
                kind: Some(Kind::Raw),
            }
        );
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(
            error("a,readonly=yes"),
            "readonly: \"yes\" is neither on nor off"
        );
        assert!(error("a,count=99999").contains("0 to 65535"));
        assert!(error("a,count").contains("key=value"));
        assert!(error("a,path=b").contains("twice"));
        assert_eq!(
            error("pth=a"),
            "unknown key \"pth\"; did you mean path?; keys are path, readonly, size, count, kind"
        );
        assert!(error("a,size=big").starts_with("size: \"big\" is not a size"));
        assert_eq!(error("a,kind=vhd"), "kind: \"vhd\" is not one of raw");
        assert_eq!(error("readonly=on"), "the key path is missing");
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in ".*") {
            let _ = parse::<Example>(&text, Some("path"));
        }
    }
}
