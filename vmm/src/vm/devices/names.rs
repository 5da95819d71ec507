//! Names and ports of devices.

use std::collections::BTreeSet;

use fanlight_api::VmConfig;
use thiserror::Error;

use super::{DeviceError, Place, hotplug_kinds};
use crate::vm::fault::{Classify, Fault};

/// Why a device's name or port is refused.
#[derive(Debug, Error)]
pub enum NameError {
    /// Not a name for a device.
    #[error("id {0:?}: a device's name has 1 to 32 of a-z, A-Z, 0-9, -, _ and .")]
    Invalid(String),
    /// Two devices of one name.
    #[error("id {0:?}: another device has this name; give another")]
    Taken(String),
    /// Not a port.
    #[error("port={0}: ports have numbers from 1 on")]
    Port(u8),
}

impl Classify for NameError {
    fn fault(&self) -> Fault {
        match self {
            Self::Invalid(_) | Self::Taken(_) | Self::Port(_) => Fault::Input,
        }
    }
}

/// Gives every device of the configuration that can have a name one of its own: `disk0`, `disk1`, … where none is given.
pub fn assign(config: &mut VmConfig) -> Result<(), DeviceError> {
    let mut taken = BTreeSet::new();
    for (kind, hotplug) in hotplug_kinds() {
        for Place { id, port } in hotplug.places(config) {
            if let Some(id) = id {
                check(id).map_err(|error| kind.error(None, error))?;
                if !taken.insert(id.clone()) {
                    return Err(kind.error(None, NameError::Taken(id.clone())));
                }
            }
            check_port(*port).map_err(|error| kind.error(id.as_deref(), error))?;
        }
    }
    for (kind, hotplug) in hotplug_kinds() {
        for Place { id, .. } in hotplug.places(config) {
            if id.is_none() {
                let name = free(kind.field, |name| taken.contains(name));
                taken.insert(name.clone());
                *id = Some(name);
            }
        }
    }
    Ok(())
}

/// Whether a device can have this name.
pub fn check(id: &str) -> Result<(), NameError> {
    const MAX: usize = 32;
    let valid = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if (1..=MAX).contains(&id.len()) && id.bytes().all(valid) {
        Ok(())
    } else {
        Err(NameError::Invalid(id.into()))
    }
}

/// Whether a device can be behind this port.
pub fn check_port(port: Option<u8>) -> Result<(), NameError> {
    match port {
        Some(0) => Err(NameError::Port(0)),
        _ => Ok(()),
    }
}

/// The first name that begins with `prefix` and is not taken: `disk0`, `disk1`, …
pub fn free(prefix: &str, taken: impl Fn(&str) -> bool) -> String {
    let mut number = 0;
    loop {
        let name = format!("{prefix}{number}");
        if !taken(&name) {
            return name;
        }
        number += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names_of_their_own() {
        let mut config: VmConfig =
            serde_json::from_str(r#"{"disk": [{"path": "a"}, {"path": "b", "id": "disk0"}]}"#)
                .unwrap();
        assign(&mut config).unwrap();
        let ids: Vec<_> = config.disk.iter().map(|d| d.id.as_deref()).collect();
        assert_eq!(ids, [Some("disk1"), Some("disk0")]);
        config.disk[0].id = Some("disk0".into());
        assert!(assign(&mut config).is_err());
        config.disk[0].id = Some("a b".into());
        assert!(assign(&mut config).is_err());
        config.disk[0].id = None;
        config.disk[0].port = Some(0);
        assert_eq!(assign(&mut config).unwrap_err().fault(), Fault::Input);
    }
}
