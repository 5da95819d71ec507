//! Features of the virtio-gpu driver alone: 2D resources, and the duration of commands
//! (`include/uapi/drm/virtgpu_drm.h`, `drivers/gpu/drm/virtio/virtgpu_trace.h`).

use std::{fs, path::Path};

use crate::{
    Context, Failure, Result,
    guest_side::drm::{
        Card, Shown, VirtgpuResourceCreate, VirtgpuResourceInfo, VirtgpuTransferToHost,
    },
};

/// `PIPE_TEXTURE_2D`, and the protocol's number of XRGB8888.
const TEXTURE_2D: u32 = 2;
const B8G8R8X8: u32 = 2;
/// The type of RESOURCE_CREATE_BLOB in a trace.
const CREATE_BLOB: &str = "type=0x10c ";
const TRACING: &str = "/sys/kernel/tracing";

/// A 2D resource, of which the host has a copy.
#[derive(Debug)]
pub struct Resource2d {
    handle: u32,
    width: u32,
    height: u32,
}

impl Card {
    /// The resource id of a picture, which the host uses too.
    pub fn resource_id(&self, shown: &Shown) -> Result<u32> {
        let mut info = VirtgpuResourceInfo {
            bo_handle: shown.handle,
            ..Default::default()
        };
        // SAFETY: the structure is the whole of the argument.
        unsafe { self.device().call(&mut info) }?;
        Ok(info.res_handle)
    }

    /// A 2D resource of XRGB8888 pixels.
    pub fn create_2d(&self, width: u32, height: u32) -> Result<Resource2d> {
        let mut create = VirtgpuResourceCreate {
            target: TEXTURE_2D,
            format: B8G8R8X8,
            width,
            height,
            size: width * height * 4,
            ..Default::default()
        };
        // SAFETY: the structure is the whole of the argument.
        unsafe { self.device().call(&mut create) }?;
        Ok(Resource2d {
            handle: create.bo_handle,
            width,
            height,
        })
    }

    /// Has the host copy a whole 2D resource, and does not wait.
    pub fn transfer(&self, resource: &Resource2d) -> Result<()> {
        let mut transfer = VirtgpuTransferToHost {
            bo_handle: resource.handle,
            area: [0, 0, 0, resource.width, resource.height, 1],
            ..Default::default()
        };
        // SAFETY: the structure is the whole of the argument.
        unsafe { self.device().call(&mut transfer) }
    }

    /// Frees a 2D resource.
    pub fn forget_2d(&self, resource: Resource2d) -> Result<()> {
        self.device().close(resource.handle)
    }
}

/// The kernel's trace of commands to the device.
#[derive(Debug)]
pub struct CommandTrace(());

impl CommandTrace {
    /// Starts the trace. Mounts tracefs if necessary.
    pub fn start() -> Result<Self> {
        let at = Path::new(TRACING);
        if !at.join("trace").exists() {
            let options = rustix::mount::MountFlags::empty();
            rustix::mount::mount("tracefs", at, "tracefs", options, None)
                .context("cannot mount tracefs")?;
        }
        for event in ["cmd_queue", "cmd_response"] {
            let path = at.join(format!("events/virtio_gpu/virtio_gpu_{event}/enable"));
            fs::write(path, "1").context("cannot trace the driver's commands")?;
        }
        Ok(Self(()))
    }

    /// Clears the trace.
    pub fn clear(&self) -> Result<()> {
        fs::write(Path::new(TRACING).join("trace"), "").context("cannot clear the trace")
    }

    /// Microseconds from the only RESOURCE_CREATE_BLOB in the queue to its response.
    pub fn create_blob(&self) -> Result<f64> {
        let text = fs::read_to_string(Path::new(TRACING).join("trace"));
        create_blob(&text.context("cannot read the trace")?)
    }
}

fn create_blob(trace: &str) -> Result<f64> {
    // A response has the request's sequence number, and its own type.
    let field = |line: &str, name: &str| {
        line.split_whitespace()
            .find_map(|word| word.strip_prefix(name).map(str::to_owned))
    };
    let at = |line: &str, event: &str| -> Option<f64> {
        let (before, _) = line.split_once(&format!(": virtio_gpu_{event}: "))?;
        before.split_whitespace().last()?.parse().ok()
    };
    let missing = || {
        Failure(format!(
            "no RESOURCE_CREATE_BLOB and its answer in:\n{trace}"
        ))
    };
    let queued = trace
        .lines()
        .find(|line| line.contains(CREATE_BLOB) && at(line, "cmd_queue").is_some())
        .ok_or_else(missing)?;
    let number = field(queued, "seqno=");
    let answered = trace
        .lines()
        .filter(|line| field(line, "seqno=") == number)
        .find_map(|line| at(line, "cmd_response"))
        .ok_or_else(missing)?;
    let queued = at(queued, "cmd_queue").ok_or_else(missing)?;
    Ok((answered - queued) * 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_found_with_its_answer() {
        let trace = "# tracer: nop\n\
            agent-61 [000] ..... 12.000100: virtio_gpu_cmd_queue: vdev=5 vq=0 name=control type=0x104 flags=0x1 fence_id=4 ctx_id=0 num_free=60 seqno=7\n\
            agent-61 [000] ..... 12.000500: virtio_gpu_cmd_queue: vdev=5 vq=0 name=control type=0x10c flags=0x0 fence_id=0 ctx_id=0 num_free=59 seqno=8\n\
            kworker-9 [000] ..... 12.000700: virtio_gpu_cmd_response: vdev=5 vq=0 name=control type=0x1100 flags=0x1 fence_id=4 ctx_id=0 num_free=61 seqno=7\n\
            kworker-9 [000] ..... 12.001750: virtio_gpu_cmd_response: vdev=5 vq=0 name=control type=0x1100 flags=0x0 fence_id=0 ctx_id=0 num_free=63 seqno=8\n";
        let time = create_blob(trace).unwrap();
        assert!((time - 1250.0).abs() < 0.5, "{time}");
        assert!(create_blob("").is_err());
    }
}
