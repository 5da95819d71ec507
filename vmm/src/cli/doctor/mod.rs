//! `fanlight doctor`: checks whether this host, and one of its PCI devices, can serve a guest with a GPU.
//! A failed check says how to fix it.

mod device;
mod host;
mod report;

use fanlight_devices::vfio::sysfs::HostFunction;

pub use report::Report;

/// Checks the host and, if one is named, a device.
pub fn report(device: Option<&HostFunction>) -> Report {
    let mut checks = host::checks();
    if let Some(function) = device {
        checks.extend(device::checks(function));
    }
    Report::new(checks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_gets_a_report() {
        assert_eq!(report(None).checks.len(), 8);
    }
}
