//! Doorbells: the driver's kicks, as ioeventfds if KVM accepts them.

use super::{
    function::VirtioPciFunction,
    layout::{NOTIFY, NOTIFY_OFF_MULTIPLIER},
};

impl VirtioPciFunction {
    /// Handles a kick that reached user space: through the configuration window, or because KVM has no ioeventfd for
    /// it.
    pub(super) fn ring_doorbell(&self, offset: u64) {
        let queue = usize::try_from(offset / NOTIFY_OFF_MULTIPLIER)
            .ok()
            .and_then(|index| self.kicks.get(index));
        if let Some(kick) = queue
            && let Err(error) = kick.write(1)
        {
            tracing::error!(%error, device = self.name, "cannot kick a queue");
        }
    }

    /// Registers the doorbells at their new address. If that fails, kicks exit to user space, which is slower but
    /// works.
    pub(super) fn move_doorbells(&self, address: Option<u64>) {
        let mut doorbells = self.doorbells.lock();
        for (index, kick) in self.kicks.iter().enumerate() {
            let offset = NOTIFY + index as u64 * NOTIFY_OFF_MULTIPLIER;
            if let Some(old) = *doorbells
                && let Err(error) = self.hypervisor.remove_doorbell(old + offset, kick)
            {
                tracing::error!(%error, device = self.name, "cannot remove a doorbell");
            }
            if let Some(new) = address
                && let Err(error) = self.hypervisor.add_doorbell(new + offset, kick)
            {
                tracing::warn!(%error, device = self.name, "cannot add a doorbell");
            }
        }
        *doorbells = address;
    }
}
