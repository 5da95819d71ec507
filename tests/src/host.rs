//! What the host at hand can do.

use std::{fs::OpenOptions, path::Path};

/// Set inside the bed, where tests run as they are.
pub const IN_BED: &str = "FANLIGHT_IN_BED";
/// `force` uses the bed even where the host could run guests, `never` fails instead of using it.
pub const BED: &str = "FANLIGHT_BED";

/// Where guests run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kvm {
    /// On this host.
    Host,
    /// In the bed; why.
    Bed(String),
}

/// Decides where guests run.
///
/// That `/dev/kvm` opens and creates machines proves nothing: a paravirtual one does both, and then
/// fails a stock kernel. It has no vmx and no svm to run guests with.
pub fn kvm() -> Kvm {
    if std::env::var_os(IN_BED).is_some() {
        return Kvm::Host;
    }
    match std::env::var(BED).as_deref() {
        Ok("force") => return Kvm::Bed(format!("{BED}=force asks for it")),
        Ok("never") => return Kvm::Host,
        _ => {}
    }
    let path = Path::new("/dev/kvm");
    if !path.exists() {
        Kvm::Bed("this machine has no /dev/kvm".into())
    } else if let Err(error) = OpenOptions::new().read(true).write(true).open(path) {
        Kvm::Bed(format!("/dev/kvm cannot be opened: {error}"))
    } else if !fanlight::kvm::processor_virtualizes() {
        Kvm::Bed("this machine's processor shows neither vmx nor svm".into())
    } else {
        Kvm::Host
    }
}
