//! The entropy device. It opens nothing of the host: the bytes come from `getrandom`.

use fanlight_devices::virtio::rng::Rng;

use super::{CLASS_OTHER, Device, Failure, Kind, Life, Opened, Opening};
use crate::vm::function::Function;

/// The entropy device; at most one.
pub static KIND: Kind = Kind {
    field: "rng",
    title: "entropy device",
    open,
    hotplug: None,
};

struct Entropy;

fn open(opening: &mut Opening) -> Opened {
    let wanted = opening.config.rng.enabled.then_some(&opening.config.rng);
    KIND.open_each(wanted, |_| None, |_| Ok(Entropy))
}

impl Device for Entropy {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn id(&self) -> &str {
        "rng"
    }

    fn build(&self, life: &mut Life) -> Result<Function, Failure> {
        life.virtio(Box::<Rng>::default(), CLASS_OTHER)
    }
}
