//! The API's calls on a machine that runs or is paused.

use std::sync::atomic::{AtomicU64, Ordering};

use fanlight_api::{
    ApiError,
    methods::{self, MachineCall},
    server::Reply,
    types::{
        self, Attached, ConsoleName, DiskSize, Done, EventName, GpuStats, MemoryStats, ResizeDisk,
        VcpuStats, VmState,
    },
};
use fanlight_devices::GuestMemory;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::{
    control::{
        errors,
        requests::Command,
        running::{Outcome, RunningMachine},
    },
    host::console::Input,
    vm::devices::{disk, gpu::Gpu},
    vm::ending::Ending,
};

impl RunningMachine<'_> {
    /// Answers a call, or keeps its reply until the machine has started or stopped.
    pub fn answer(&mut self, command: Command) {
        let paused = self.queue.state() == VmState::Paused;
        let Command {
            call,
            descriptors,
            reply,
        } = command;
        match call {
            MachineCall::VmPause(_) if !paused => {
                let result = self.machine.processors.pause().map_err(errors::machine);
                reply.send::<methods::VmPause>(result.map(|()| self.queue.paused(true)));
            }
            MachineCall::VmResume(_) if paused => {
                let result = self.machine.processors.resume().map_err(errors::machine);
                reply.send::<methods::VmResume>(result.map(|()| self.queue.paused(false)));
            }
            MachineCall::VmPowerButton(_) if !paused => {
                let result = self.machine.press_power_button();
                let result = result.map_err(|error| errors::power_button(&error));
                reply.send::<methods::VmPowerButton>(result.map(|()| Done {}));
            }
            MachineCall::VmNmi(_) if !paused => {
                let result = self.machine.processors.raise_nmi().map_err(errors::machine);
                reply.send::<methods::VmNmi>(result.map(|()| Done {}));
            }
            MachineCall::VmCreate(_)
            | MachineCall::VmBoot(_)
            | MachineCall::VmPause(_)
            | MachineCall::VmResume(_)
            | MachineCall::VmPowerButton(_)
            | MachineCall::VmNmi(_) => self.queue.refuse(&call, reply),
            MachineCall::VmReset(_) => {
                self.queue.will_start(reply);
                self.end(Outcome::Restart);
            }
            MachineCall::VmStop(_) => {
                self.queue.will_stop(reply);
                self.end(Outcome::End(Ending::Stopped));
            }
            MachineCall::VmWait(_) => self.queue.wait(reply),
            MachineCall::VmStats(_) => reply.send::<methods::VmStats>(Ok(self.stats())),
            MachineCall::DeviceList(_) => {
                reply.send::<methods::DeviceList>(Ok(types::DeviceList {
                    devices: self.machine.topology.list(),
                    free_ports: self.machine.topology.free_ports(),
                }));
            }
            MachineCall::DeviceAdd(add) => {
                reply.send::<methods::DeviceAdd>(self.add_device(add, &descriptors));
            }
            MachineCall::DeviceRemove(device) => {
                let result = self.machine.topology.request_unplug(&device.id);
                let result = result.map_err(|error| errors::topology(&error, "id"));
                reply.send::<methods::DeviceRemove>(result.map(|()| Done {}));
            }
            MachineCall::DiskResize(resize) => {
                reply.send::<methods::DiskResize>(self.resize_disk(&resize));
            }
            MachineCall::ConsoleAttach(params) => {
                let index = match params.console {
                    ConsoleName::Serial => 0,
                    ConsoleName::Console => 1,
                };
                let input = self.inputs.get_mut(index).map(|input| &mut *input.source);
                attach(input, reply);
            }
        }
    }

    fn stats(&self) -> types::VmStats {
        let vcpus = self
            .machine
            .processors
            .exits()
            .zip(0..)
            .map(|(exits, vcpu)| {
                let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
                VcpuStats {
                    vcpu,
                    io_in: count(&exits.io_in),
                    io_out: count(&exits.io_out),
                    mmio_read: count(&exits.mmio_read),
                    mmio_write: count(&exits.mmio_write),
                    interrupted: count(&exits.interrupted),
                    other: count(&exits.other),
                }
            });
        let ram = self.ram;
        let gpus = self.hotplug.devices.of().map(|gpu: &Gpu| {
            let statistics = gpu.display().statistics();
            GpuStats {
                flushes: statistics.flushes,
                copied: statistics.copied_bytes,
                resource_memory: statistics.resource_memory,
            }
        });
        types::VmStats {
            vcpus: vcpus.collect(),
            devices: self.machine.topology.stats(),
            memory: MemoryStats {
                guest: ram.size(),
                guest_allocated: allocated(ram.memory()).unwrap_or(0),
                resident: resident().unwrap_or(0),
            },
            gpus: gpus.collect(),
        }
    }

    fn resize_disk(&mut self, resize: &ResizeDisk) -> Result<DiskSize, ApiError> {
        let (id, size) = (&resize.id, resize.size.0);
        let size = disk::resize(&self.hotplug.devices, id, size);
        let size = size.map_err(|error| errors::resize(&error))?;
        self.machine.topology.config_changed(&resize.id);
        let events = &self.queue.events;
        events.publish_device(EventName::DiskResized, &resize.id);
        Ok(DiskSize { size })
    }
}

/// Connects a client to a console.
pub fn attach(input: Option<&mut Input>, reply: Reply) {
    let client = match input.map(Input::attach) {
        None => Err(errors::no_console()),
        Some(None) => Err(errors::console_backend()),
        Some(Some(client)) => client.map_err(|error| errors::console_client(&error)),
    };
    match client {
        Ok(client) => {
            reply.send_with::<methods::ConsoleAttach>(Ok(Attached { fd: 0 }), vec![client.into()]);
        }
        Err(error) => reply.refuse(error),
    }
}

/// How much of guest RAM has pages, in bytes.
fn allocated(mem: &GuestMemory) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    /// What st_blocks counts.
    const BLOCK: u64 = 512;
    let file = mem.iter().next()?.file_offset()?;
    Some(file.file().metadata().ok()?.blocks() * BLOCK)
}

/// The process's resident memory in bytes.
fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}
