//! The description of an end-to-end test.

use super::guest::Assets;
use crate::{Result, nested_host::L1Device};

/// An end-to-end test.
#[derive(Clone, Copy)]
pub struct TestCase {
    /// Its group and name, which filters match.
    pub name: &'static str,
    /// Devices of L1 that the test passes through. Empty for most tests.
    pub devices: &'static [L1Device],
    /// Whether no other test may run on the same host, before or in parallel: it changes kernel settings.
    pub alone: bool,
    /// Whether it can run with a named device of this machine instead of [`TestCase::devices`].
    pub takes_named_device: bool,
    /// The test's function.
    pub run: fn(&Assets) -> Result<()>,
}

impl TestCase {
    /// A test that needs no devices and leaves its host unchanged.
    pub const fn new(name: &'static str, run: fn(&Assets) -> Result<()>) -> Self {
        Self {
            name,
            devices: &[],
            alone: false,
            takes_named_device: false,
            run,
        }
    }

    /// Adds devices that the test passes through.
    pub const fn devices(mut self, devices: &'static [L1Device]) -> Self {
        self.devices = devices;
        self
    }

    /// Gives the test a nested host of its own.
    pub const fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// Lets the test also run with a named device of this machine.
    pub const fn or_named_device(mut self) -> Self {
        self.takes_named_device = true;
        self.alone()
    }

    /// Whether it can run in an L1 that other tests have used, and leave that L1 to others.
    pub fn shares_host(&self) -> bool {
        self.devices.is_empty() && !self.alone
    }
}
