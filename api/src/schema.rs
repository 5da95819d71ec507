//! The description of the API: an OpenRPC 1.3 document, generated from the Rust types.

use std::sync::OnceLock;

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::{API_VERSION, error::ApiError, methods::METHODS, types::Event};

/// The document. It is made once.
pub fn document() -> &'static Value {
    static DOCUMENT: OnceLock<Value> = OnceLock::new();
    DOCUMENT.get_or_init(make)
}

/// The document's text.
pub fn text() -> &'static str {
    static TEXT: OnceLock<String> = OnceLock::new();
    TEXT.get_or_init(|| document().to_string())
}

fn make() -> Value {
    let settings = SchemaSettings::draft2020_12()
        .with(|settings| settings.definitions_path = "/components/schemas".into());
    let mut generator = settings.into_generator();
    let methods: Vec<_> = METHODS
        .iter()
        .map(|method| {
            let params = (method.params)(&mut generator).to_value();
            let required = params["required"].as_array().cloned().unwrap_or_default();
            let params: Vec<_> = params["properties"]
                .as_object()
                .unwrap_or(&Map::new())
                .iter()
                .map(|(name, schema)| {
                    json!({
                        "name": name,
                        "description": schema["description"],
                        "required": required.iter().any(|other| other == name),
                        "schema": schema,
                    })
                })
                .collect();
            let result = (method.result)(&mut generator).to_value();
            json!({
                "name": method.name,
                "description": method.description.trim(),
                "paramStructure": "by-name",
                "params": params,
                "result": {"name": "result", "schema": result},
            })
        })
        .collect();
    let event = generator.subschema_for::<Event>().to_value();
    let error = generator.subschema_for::<ApiError>().to_value();
    json!({
        "openrpc": "1.3.2",
        "info": {
            "title": "Fanlight",
            "version": API_VERSION,
            "description": "Drives a virtual machine over a UNIX socket: JSON-RPC 2.0, one object a line.",
        },
        "methods": methods,
        "x-notifications": [{
            "name": "event",
            "description": "Something happened. Sent after events.subscribe.",
            "schema": event,
        }],
        "x-error": error,
        "components": {"schemas": generator.take_definitions(true)},
    })
}

/// A schema of the document with the definitions that it refers to, for a validator.
pub fn standalone(document: &Value, schema: &Value) -> Value {
    let mut schema = schema.clone();
    match schema.as_object_mut() {
        Some(object) => {
            object.insert("components".into(), document["components"].clone());
            schema
        }
        None => schema,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn validator(schema: &Value) -> jsonschema::Validator {
        jsonschema::validator_for(&standalone(document(), schema)).unwrap()
    }

    #[test]
    fn every_schema_is_one_and_every_method_is_described() {
        let methods = document()["methods"].as_array().unwrap();
        assert_eq!(methods.len(), METHODS.len());
        for method in methods {
            assert!(!method["description"].as_str().unwrap().is_empty());
            validator(&method["result"]["schema"]);
            for param in method["params"].as_array().unwrap() {
                validator(&param["schema"]);
            }
        }
    }

    #[test]
    fn a_machine_is_valid_and_a_misspelt_one_is_not() {
        let create = &document()["components"]["schemas"]["VmConfig"];
        let create = validator(create);
        let config = serde_json::to_value(crate::VmConfig {
            disk: vec!["path=a".parse().unwrap()],
            net: vec!["tap=fd:3".parse().unwrap()],
            ..Default::default()
        })
        .unwrap();
        assert!(create.is_valid(&config), "{config}");
        assert!(!create.is_valid(&json!({"cpu": 1})));
        assert!(!create.is_valid(&json!({"disk": [{"path": 1}]})));
    }

    #[test]
    fn the_document_is_small() {
        assert!(text().len() < 128 << 10, "{}", text().len());
    }
}
