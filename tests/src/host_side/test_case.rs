//! What an end-to-end test says of itself.

use super::guest::Assets;
use crate::{Result, nested_host::L1Device};

/// An end-to-end test.
#[derive(Clone, Copy)]
pub struct TestCase {
    /// Its group and name, as filters take them.
    pub name: &'static str,
    /// Devices of L1 that it passes through. Empty for most tests.
    pub devices: &'static [L1Device],
    /// Whether no other test may run on the same host, before or beside it: it changes settings of the kernel.
    pub alone: bool,
    /// Whether it can run with a device of this machine that a person names, instead of [`TestCase::devices`].
    pub takes_named_device: bool,
    /// The test.
    pub run: fn(&Assets) -> Result<()>,
}

impl TestCase {
    /// A test that needs no devices and leaves its host as it was.
    pub const fn new(name: &'static str, run: fn(&Assets) -> Result<()>) -> Self {
        Self {
            name,
            devices: &[],
            alone: false,
            takes_named_device: false,
            run,
        }
    }

    /// The test passes these devices through.
    pub const fn devices(mut self, devices: &'static [L1Device]) -> Self {
        self.devices = devices;
        self
    }

    /// The test has its host for itself.
    pub const fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// The test runs with a device of this machine too.
    pub const fn or_named_device(mut self) -> Self {
        self.takes_named_device = true;
        self.alone()
    }

    /// Whether it can run in an L1 in which other tests ran, and leave it to others.
    pub fn shares_host(&self) -> bool {
        self.devices.is_empty() && !self.alone
    }
}
