//! Parameters of a method on the command line.

use std::os::fd::OwnedFd;

use fanlight_api::{
    OrFd,
    socket::{Descriptors, MAX_FDS},
};
use serde_json::{Map, Value, json};

/// Parameters, and the descriptors that they name.
#[derive(Debug)]
pub struct Params {
    /// The parameters as the server reads them.
    pub value: Value,
    /// Descriptors to send: `{"fd": N}` is the Nth.
    pub fds: Vec<OwnedFd>,
}

impl Params {
    /// Reads one JSON object, or pairs. They name descriptors that this process inherited.
    pub fn read(arguments: &[String]) -> Result<Self, String> {
        let mut params = Self {
            value: read(arguments)?,
            fds: Vec::new(),
        };
        let mut value = params.value.take();
        params.hand_over(&mut value)?;
        params.value = value;
        Ok(params)
    }

    /// Collects every descriptor that `value` names, and replaces its number by its index.
    fn hand_over(&mut self, value: &mut Value) -> Result<(), String> {
        if let Some(number) = descriptor(value) {
            if self.fds.len() == MAX_FDS {
                return Err(format!("more than {MAX_FDS} descriptors are named"));
            }
            let fd = Descriptors::Inherited.take(number);
            let fd = fd.map_err(|error| error.message)?;
            *value = json!({"fd": self.fds.len()});
            self.fds.push(fd);
            return Ok(());
        }
        match value {
            Value::Object(fields) => fields.values_mut().try_for_each(|one| self.hand_over(one)),
            Value::Array(list) => list.iter_mut().try_for_each(|one| self.hand_over(one)),
            _ => Ok(()),
        }
    }
}

/// The number of the descriptor that `value` names: `"fd:3"` or `{"fd": 3}`.
fn descriptor(value: &Value) -> Option<u32> {
    let named = match value {
        Value::String(_) => value,
        Value::Object(fields) if fields.len() == 1 && fields.contains_key("fd") => value,
        _ => return None,
    };
    match serde_json::from_value(named.clone()) {
        Ok(OrFd::<String>::Fd(number)) => Some(number),
        _ => None,
    }
}

/// Reads one JSON object, or pairs.
fn read(arguments: &[String]) -> Result<Value, String> {
    if let [one] = arguments
        && one.trim_start().starts_with('{')
    {
        return serde_json::from_str(one).map_err(|error| format!("{one}: not JSON: {error}"));
    }
    let mut params = Value::Object(Map::new());
    for argument in arguments {
        let (path, text) = argument
            .split_once('=')
            .ok_or_else(|| format!("{argument:?} is neither a JSON object nor key=value"))?;
        let value = serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()));
        let mut place = &mut params;
        for key in path.split('.') {
            let object = place.as_object_mut().ok_or_else(|| {
                format!("{path:?}: {key:?} is a field of a value that is not an object")
            })?;
            place = object
                .entry(key)
                .or_insert_with(|| Value::Object(Map::new()));
        }
        if place.as_object().is_none_or(|object| !object.is_empty()) {
            return Err(format!("{path:?} is given twice"));
        }
        *place = value;
    }
    Ok(params)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn read(arguments: &[&str]) -> Result<Params, String> {
        let arguments: Vec<_> = arguments.iter().map(|text| (*text).to_owned()).collect();
        Params::read(&arguments)
    }

    #[test]
    fn pairs_and_json_describe_the_same() {
        let pairs = read(&["disk.path=a b", "disk.readonly=true", "disk.port=2"]).unwrap();
        let json = json!({"disk": {"path": "a b", "readonly": true, "port": 2}});
        assert_eq!(pairs.value, json);
        assert_eq!(read(&[&json.to_string()]).unwrap().value, json);
        assert_eq!(read(&[]).unwrap().value, json!({}));
        for bad in [&["disk"][..], &["{"], &["a=1", "a=2"], &["a=1", "a.b=2"]] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn descriptors_are_named_by_their_indices() {
        let (a, b) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let (a, b) = (a.as_raw_fd(), b.as_raw_fd());
        let pairs = read(&[
            &format!("kernel=fd:{a}"),
            &format!(r#"disk=[{{"path": {{"fd": {b}}}}}, {{"path": "./fd:{b}"}}]"#),
        ])
        .unwrap();
        let disks = json!([{"path": {"fd": 0}}, {"path": format!("./fd:{b}")}]);
        assert_eq!(pairs.value, json!({"kernel": {"fd": 1}, "disk": disks}));
        assert_eq!(pairs.fds.len(), 2);
        let json = json!({"kernel": format!("fd:{a}")}).to_string();
        assert_eq!(read(&[&json]).unwrap().value, json!({"kernel": {"fd": 0}}));
        let error = read(&["kernel=fd:987654"]).unwrap_err();
        assert!(
            error.contains("descriptor 987654 cannot be used"),
            "{error}"
        );
        let many = vec![json!({"fd": a}); MAX_FDS + 1];
        let error = read(&[&json!({"disk": many}).to_string()]).unwrap_err();
        assert!(error.contains("more than"), "{error}");
    }
}
