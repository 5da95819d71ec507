//! Gives a device's queues to the host kernel: common code of vhost-net and vhost-vsock.

use std::io;

use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{ActivateError, ActiveQueue};
use crate::GuestMemory;

/// The [`ActivateError`] of a step that vhost refused.
pub fn host_error(device: &'static str, action: &str, error: vhost::Error) -> ActivateError {
    ActivateError::Host {
        device,
        action: action.into(),
        source: io::Error::other(error),
    }
}

/// Sets guest memory, negotiated features and queues of a backend, without starting it.
pub fn set_up(
    device: &'static str,
    backend: &impl VhostBackend,
    mem: &GuestMemory,
    features: u64,
    queues: &[&ActiveQueue],
) -> Result<(), ActivateError> {
    let fail = |action: &'static str| move |error| host_error(device, action, error);
    backend
        .set_features(features)
        .map_err(fail("negotiate features with vhost"))?;
    let regions = mem
        .iter()
        .map(VhostUserMemoryRegionInfo::from_guest_region)
        .collect::<Result<Vec<_>, _>>()
        .map_err(fail("describe memory to vhost"))?;
    backend
        .set_mem_table(&regions)
        .map_err(fail("give memory to vhost"))?;
    for (index, active) in queues.iter().enumerate() {
        let queue = &active.queue;
        backend
            .set_vring_num(index, queue.size())
            .map_err(fail("set a queue's size"))?;
        backend
            .set_vring_addr(
                index,
                &VringConfigData {
                    queue_max_size: queue.max_size(),
                    queue_size: queue.size(),
                    flags: 0,
                    desc_table_addr: queue.desc_table(),
                    used_ring_addr: queue.used_ring(),
                    avail_ring_addr: queue.avail_ring(),
                    log_addr: None,
                },
            )
            .map_err(fail("set a queue's addresses"))?;
        backend
            .set_vring_base(index, 0)
            .map_err(fail("set a queue's position"))?;
        let silent;
        let call = match &active.vector {
            Some(vector) => vector.event(),
            None => {
                silent = EventFd::new(EFD_NONBLOCK).map_err(|source| ActivateError::Host {
                    device,
                    action: "make a descriptor".into(),
                    source,
                })?;
                &silent
            }
        };
        backend
            .set_vring_call(index, call)
            .map_err(fail("set a queue's interrupt"))?;
        backend
            .set_vring_kick(index, &active.kick)
            .map_err(fail("set a queue's doorbell"))?;
    }
    Ok(())
}
