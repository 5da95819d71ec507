//! Why a device cannot be opened or built.

use std::error::Error;

use super::{Device, Kind};
use crate::vm::fault::{Classify, Fault};

/// A device that cannot be opened or built: which, why, and who is at fault.
#[derive(Debug, thiserror::Error)]
#[error("{title}{}", match id { Some(id) if id != title => format!(" {id}"), _ => String::new() })]
pub struct DeviceError {
    /// The kind's field in the configuration, such as `net`.
    pub field: &'static str,
    title: &'static str,
    /// The device's name; none if it is about all of the kind.
    id: Option<String>,
    fault: Fault,
    #[source]
    source: Box<dyn Error + Send + Sync>,
}

impl Classify for DeviceError {
    fn fault(&self) -> Fault {
        self.fault
    }
}

/// An error of one kind of device, without the name of the device.
#[derive(Debug)]
pub struct Failure {
    fault: Fault,
    source: Box<dyn Error + Send + Sync>,
}

impl<E: Classify + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self {
            fault: error.fault(),
            source: Box::new(error),
        }
    }
}

impl Kind {
    /// An error of the device `id` of this kind, or of all of its devices.
    pub fn error(&self, id: Option<&str>, failure: impl Into<Failure>) -> DeviceError {
        let Failure { fault, source } = failure.into();
        DeviceError {
            field: self.field,
            title: self.title,
            id: id.map(str::to_owned),
            fault,
            source,
        }
    }
}

/// Adds the name of the device to an error.
pub fn of_device(device: &dyn Device) -> impl Fn(Failure) -> DeviceError {
    let (kind, id) = (device.kind(), device.id().to_owned());
    move |failure| kind.error(Some(&id), failure)
}
