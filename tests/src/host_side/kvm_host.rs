//! What the host at hand can do.

use std::{fs::OpenOptions, path::Path};

/// Set inside the nested host, where tests run as they are.
pub const IN_NESTED_HOST: &str = "FANLIGHT_IN_NESTED_HOST";
/// `force` uses the nested host even where the host could run guests, `never` fails instead of using it.
pub const NESTED_HOST: &str = "FANLIGHT_NESTED_HOST";

/// Where guests run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kvm {
    /// On this host.
    Host,
    /// In the nested host; why.
    NestedHost(String),
}

/// Decides where guests run.
///
/// That `/dev/kvm` opens and creates machines proves nothing: a paravirtual one does both, and then
/// fails a stock kernel. It has no vmx and no svm to run guests with.
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
