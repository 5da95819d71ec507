//! Whether this host can run guests.

use std::{fs::OpenOptions, path::Path};

/// Set inside the nested host, where tests run directly.
pub const IN_NESTED_HOST: &str = "FANLIGHT_IN_NESTED_HOST";
/// `force` uses the nested host even if this host could run guests; `never` fails instead of using it.
pub const NESTED_HOST: &str = "FANLIGHT_NESTED_HOST";

/// The host that runs guests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kvm {
    /// This host.
    Host,
    /// The nested host, with the reason.
    NestedHost(String),
}

/// Decides which host runs guests.
///
/// An open of `/dev/kvm` and a new machine prove nothing: a paravirtual KVM offers both, and then fails with a stock
/// kernel. Its CPU has neither vmx nor svm.
pub fn kvm() -> Kvm {
    if std::env::var_os(IN_NESTED_HOST).is_some() {
        return Kvm::Host;
    }
    match std::env::var(NESTED_HOST).as_deref() {
        Ok("force") => return Kvm::NestedHost(format!("{NESTED_HOST}=force asks for it")),
        Ok("never") => return Kvm::Host,
        _ => {}
    }
    let path = Path::new("/dev/kvm");
    if !path.exists() {
        Kvm::NestedHost("this machine has no /dev/kvm".into())
    } else if let Err(error) = OpenOptions::new().read(true).write(true).open(path) {
        Kvm::NestedHost(format!("/dev/kvm cannot be opened: {error}"))
    } else if !fanlight::kvm::processor_virtualizes() {
        Kvm::NestedHost("this machine's processor shows neither vmx nor svm".into())
    } else {
        Kvm::Host
    }
}
