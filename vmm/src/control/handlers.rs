//! What the API asks of a machine that runs or stands still.

use std::sync::atomic::Ordering;

use fanlight_api::{
    ApiError, DiskConfig, ErrorKind, NetConfig, VfioConfig,
    methods::{self, Call},
    server::Reply,
    socket::Descriptors,
    types::{
        AddDevice, Added, Attached, ConsoleName, DeviceList, DiskSize, Done, EventName, GpuStats,
        MemoryStats, ResizeDisk, VcpuStats, VmState, VmStats,
    },
};
use fanlight_devices::{GuestMemory, error_line, pci::SlotError, vfio::VfioError};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::{
    control::queue::{Command, life_error},
    control::run_loop::{MainLoop, Outcome},
    host::console::Input,
    host::resources::{ConfigError, Disk, Interface, check_id, free_id},
    vm::ending::Ending,
    vm::host_requests::HostRequests,
    vm::machine::{MachineError, block_device, net_device},
    vm::passthrough::{Passthrough, PassthroughError},
    vm::pci_topology::{InventoryError, NewDevice},
};

impl MainLoop<'_> {
    pub(super) fn take_commands(&mut self) {
        // Once the machine is to end or to restart, the rest is for the one after.
        if self.outcome.is_none()
            && let Some(command) = self.desk.next()
        {
            self.command(command);
        }
    }

    fn command(&mut self, command: Command) {
        let paused = self.desk.state() == VmState::Paused;
        let Command {
            call,
            descriptors,
            reply,
        } = command;
        match call {
            Call::VmPause(_) if !paused => {
                let result = self.machine.pause().map_err(machine_error);
                reply.send::<methods::VmPause>(result.map(|()| self.desk.paused(true)));
            }
            Call::VmResume(_) if paused => {
                let result = self.machine.resume().map_err(machine_error);
                reply.send::<methods::VmResume>(result.map(|()| self.desk.paused(false)));
            }
            Call::VmPowerButton(_) if !paused => {
                let result = self.machine.press_power_button().map_err(|error| {
                    let text = format!("cannot press the power button: {error}");
                    ApiError::new(ErrorKind::HostFailure, text)
                });
                reply.send::<methods::VmPowerButton>(result.map(|()| Done {}));
            }
            Call::VmNmi(_) if !paused => {
                let result = self.machine.raise_nmi().map_err(machine_error);
                reply.send::<methods::VmNmi>(result.map(|()| Done {}));
            }
            Call::VmReset(_) => {
                self.desk.will_start(reply);
                self.end(Outcome::Restart);
            }
            Call::VmStop(_) => {
                self.desk.will_stop(reply);
                self.end(Outcome::End(Ending::Stopped));
            }
            Call::VmWait(_) => self.desk.wait(reply),
            Call::VmStatsMethod(_) => reply.send::<methods::VmStatsMethod>(Ok(self.stats())),
            Call::DeviceListMethod(_) => {
                reply.send::<methods::DeviceListMethod>(Ok(DeviceList {
                    devices: self.machine.inventory.list(),
                    free_ports: self.machine.inventory.free_ports(),
                }));
            }
            Call::DeviceAdd(add) => {
                reply.send::<methods::DeviceAdd>(self.add_device(add, &descriptors));
            }
            Call::DeviceRemove(device) => {
                let result = self.machine.inventory.ask_back(&device.id);
                let result = result.map_err(|error| inventory_error(&error, "id"));
                reply.send::<methods::DeviceRemove>(result.map(|()| Done {}));
            }
            Call::DiskResize(resize) => {
                reply.send::<methods::DiskResize>(self.resize_disk(&resize));
            }
            Call::ConsoleAttach(which) => {
                let index = match which.console {
                    ConsoleName::Serial => 0,
                    ConsoleName::Console => 1,
                };
                let input = self.inputs.get_mut(index).map(|input| &mut *input.source);
                attach(input, reply);
            }
            call => self.desk.refuse(Command {
                call,
                descriptors,
                reply,
            }),
        }
    }

    /// Lets a guest go on that is to shut down.
    pub(super) fn resume_silently(&mut self) {
        match self.machine.resume() {
            Ok(()) => {
                self.desk.paused(false);
            }
            Err(error) => tracing::error!(error = %error_line(&error), "the guest does not go on"),
        }
    }

    fn stats(&self) -> VmStats {
        let vcpus = self.machine.exits.iter().zip(0..).map(|(exits, vcpu)| {
            let count = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
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
        let ram = self.holdings.ram;
        let gpus = self.holdings.graphics.into_iter().flat_map(|graphics| {
            graphics.gpus.iter().map(|gpu| {
                let statistics = gpu.display.statistics();
                GpuStats {
                    flushes: statistics.flushes,
                    copied: statistics.transferred_bytes,
                    resource_memory: statistics.resource_memory,
                }
            })
        });
        VmStats {
            vcpus: vcpus.collect(),
            devices: self.machine.inventory.stats(),
            memory: MemoryStats {
                guest: ram.size(),
                guest_allocated: allocated(ram.memory()).unwrap_or(0),
                resident: resident().unwrap_or(0),
            },
            gpus: gpus.collect(),
        }
    }

    fn add_device(&mut self, add: AddDevice, descriptors: &Descriptors) -> Result<Added, ApiError> {
        match (add.disk, add.net, add.vfio) {
            (Some(disk), None, None) => self.add_disk(disk, descriptors),
            (None, Some(net), None) => self.add_net(net, descriptors),
            (None, None, Some(vfio)) => self.add_vfio(vfio, descriptors),
            _ => Err(ApiError::new(
                ErrorKind::InvalidParams,
                "device.add takes one device: disk, net or vfio",
            )),
        }
    }

    /// Name and port of a device that is to come.
    fn place(
        &self,
        kind: &str,
        id: Option<String>,
        port: Option<u8>,
    ) -> Result<(String, u8), ApiError> {
        let inventory = &self.machine.inventory;
        let id = id.unwrap_or_else(|| free_id(kind, |name| inventory.has(name)));
        check_id(&id).map_err(|error| config_error(&error, format!("{kind}.id")))?;
        if inventory.has(&id) {
            let error = InventoryError::Exists(id);
            return Err(inventory_error(&error, &format!("{kind}.id")));
        }
        let port = inventory
            .choose_port(port)
            .map_err(|error| inventory_error(&error, &format!("{kind}.port")))?;
        Ok((id, port))
    }

    fn plug(&mut self, device: NewDevice, kind: &str) -> Result<(), ApiError> {
        let result = self.machine.inventory.plug(device);
        result.map_err(|error| inventory_error(&error, kind))
    }

    fn add_disk(
        &mut self,
        mut config: DiskConfig,
        descriptors: &Descriptors,
    ) -> Result<Added, ApiError> {
        let (id, port) = self.place("disk", config.id, config.port)?;
        config.id = Some(id.clone());
        config.port = Some(port);
        let disk = Disk::open(&config, descriptors)
            .map_err(|error| config_error(&error, "disk".into()))?;
        self.plug(block_device(&disk, self.holdings.config.cpus), "disk")?;
        self.holdings.disks.push(disk);
        self.holdings.config.disk.push(config);
        Ok(self.added(id, port))
    }

    fn add_net(
        &mut self,
        mut config: NetConfig,
        descriptors: &Descriptors,
    ) -> Result<Added, ApiError> {
        let (id, port) = self.place("net", config.id, config.port)?;
        config.id = Some(id.clone());
        config.port = Some(port);
        let interface = Interface::open(&config, descriptors)
            .map_err(|error| config_error(&error, "net".into()))?;
        let device = net_device(&interface, self.holdings.ram.memory()).map_err(machine_error)?;
        self.plug(device, "net")?;
        self.holdings.interfaces.push(interface);
        self.holdings.config.net.push(config);
        Ok(self.added(id, port))
    }

    fn add_vfio(
        &mut self,
        mut config: VfioConfig,
        descriptors: &Descriptors,
    ) -> Result<Added, ApiError> {
        let (id, port) = self.place("vfio", config.id, config.port)?;
        config.id = Some(id.clone());
        config.port = Some(port);
        let holdings = &mut self.holdings;
        Passthrough::add(holdings.passthrough, &config, descriptors)
            .map_err(|error| config_error(&error.into(), "vfio".into()))?;
        if let Err(error) = self.plug_vfio(&id) {
            self.close_vfio(&id);
            return Err(error);
        }
        self.holdings.config.vfio.push(config);
        Ok(self.added(id, port))
    }

    fn plug_vfio(&mut self, id: &str) -> Result<(), ApiError> {
        let Some(passthrough) = &*self.holdings.passthrough else {
            return Ok(());
        };
        let Some(passed) = passthrough.find(id) else {
            return Ok(());
        };
        self.holdings
            .requests
            .follow(&passed.device)
            .map_err(|error| machine_error(error.into()))?;
        let mem = self.holdings.ram.memory();
        self.machine
            .plug_passed_through(passed, &passthrough.iommu, mem)
            .map_err(|error| inventory_error(&error, "vfio"))
    }

    /// Closes a device of the host's that the machine has no longer, and gives it back.
    fn close_vfio(&mut self, id: &str) {
        let Some(passthrough) = &mut *self.holdings.passthrough else {
            return;
        };
        if passthrough.devices.iter().all(|passed| passed.id == id) {
            // The container forgets what is mapped with its last device.
            self.machine.end_dma();
            *self.holdings.passthrough = None;
        } else {
            passthrough.devices.retain(|passed| passed.id != id);
        }
    }

    /// The host wants passed-through devices back. The guest is asked for each first; who still has it when the host
    /// asks again loses it.
    pub(super) fn take_requests(&mut self) {
        for id in HostRequests::take(self.holdings.passthrough.as_ref()) {
            if self.requested.insert(id.clone()) {
                tracing::warn!(
                    id,
                    "the host wants a device back: the guest is asked for it"
                );
                let events = &self.desk.events;
                events.publish_device(EventName::DeviceRequested, &id);
                if let Err(error) = self.machine.inventory.ask_back(&id) {
                    tracing::info!(id, "the guest cannot be asked: {}", error_line(&error));
                }
            } else {
                tracing::warn!(
                    id,
                    "the host takes a device away that the guest has not given up"
                );
                self.machine.inventory.take_away(&id);
                self.removed(&id);
            }
        }
    }

    fn added(&self, id: String, port: u8) -> Added {
        self.desk.set_config(self.holdings.config);
        let events = &self.desk.events;
        events.publish_device(EventName::DeviceAdded, &id);
        Added { id, port }
    }

    /// A device is gone: what it used of the host is closed.
    pub(super) fn removed(&mut self, id: &str) {
        let holdings = &mut self.holdings;
        holdings.disks.retain(|disk| disk.id != id);
        holdings.interfaces.retain(|interface| interface.id != id);
        let is = |other: &Option<String>| other.as_deref() == Some(id);
        holdings.config.disk.retain(|disk| !is(&disk.id));
        holdings.config.net.retain(|net| !is(&net.id));
        holdings.config.vfio.retain(|device| !is(&device.id));
        self.close_vfio(id);
        self.requested.remove(id);
        let holdings = &mut self.holdings;
        self.desk.set_config(holdings.config);
        tracing::info!(id, "a device is gone");
        let events = &self.desk.events;
        events.publish_device(EventName::DeviceRemoved, id);
    }

    fn resize_disk(&mut self, resize: &ResizeDisk) -> Result<DiskSize, ApiError> {
        let disk = self.holdings.disks.iter().find(|disk| disk.id == resize.id);
        let Some(disk) = disk else {
            let text = format!(
                "there is no disk {:?}; device.list has their names",
                resize.id
            );
            let names = self.holdings.disks.iter().map(|disk| disk.id.as_str());
            return Err(ApiError::new(ErrorKind::NotFound, text)
                .at("id")
                .with_nearest(&resize.id, names));
        };
        disk.image.grow(resize.size.0).map_err(|error| {
            let kind = match error.kind() {
                std::io::ErrorKind::InvalidInput | std::io::ErrorKind::Unsupported => {
                    ErrorKind::BadInput
                }
                _ => ErrorKind::HostFailure,
            };
            let text = format!(
                "disk {:?} cannot be {} bytes: {error}",
                resize.id, resize.size.0
            );
            ApiError::new(kind, text).at("size")
        })?;
        let size = disk.image.size();
        self.machine.inventory.config_changed(&resize.id);
        let events = &self.desk.events;
        events.publish_device(EventName::DiskResized, &resize.id);
        Ok(DiskSize { size })
    }
}

/// Connects a client to a console.
pub fn attach(input: Option<&mut Input>, reply: Reply) {
    let refuse = |kind, text: &str| ApiError::new(kind, text).at("console");
    let result = match input.map(Input::attach) {
        None => Err(refuse(
            ErrorKind::NotFound,
            "the machine has no virtio console; give it one with \"console\": \"null\"",
        )),
        Some(None) => Err(refuse(
            ErrorKind::BadInput,
            "the console's backend is stdio or a file; only null and socket can be attached to",
        )),
        Some(Some(Err(error))) if error.kind() == std::io::ErrorKind::ResourceBusy => Err(refuse(
            ErrorKind::Busy,
            "the console has a client already; it must go first",
        )),
        Some(Some(Err(error))) => Err(refuse(
            ErrorKind::HostFailure,
            &format!("cannot connect to the console: {error}"),
        )),
        Some(Some(Ok(client))) => Ok(client),
    };
    match result {
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

fn machine_error(error: MachineError) -> ApiError {
    life_error(&error.into())
}

/// A configuration's mistake as the API tells it.
pub fn config_error(error: &ConfigError, field: String) -> ApiError {
    let kind = match error {
        ConfigError::Descriptor { .. }
        | ConfigError::Vfio(
            PassthroughError::Descriptor(_)
            | PassthroughError::NotANode(_)
            | PassthroughError::Vfio(
                VfioError::NotAContainer
                | VfioError::NotAGroup(_)
                | VfioError::NotInGroup(_)
                | VfioError::GroupInContainer(_),
            ),
        ) => ErrorKind::BadDescriptor,
        _ => ErrorKind::BadInput,
    };
    let error = ApiError::new(kind, error_line(error));
    if field.is_empty() {
        error
    } else {
        error.at(field)
    }
}

fn inventory_error(error: &InventoryError, field: &str) -> ApiError {
    let kind = match error {
        InventoryError::NotFound(_) => ErrorKind::NotFound,
        InventoryError::Exists(_) => ErrorKind::Exists,
        InventoryError::Slot(SlotError::Busy(_)) => ErrorKind::Busy,
        InventoryError::Slot(SlotError::Occupied(_)) => ErrorKind::Exists,
        InventoryError::Machine(error) if !error.is_bad_input() => ErrorKind::HostFailure,
        _ => ErrorKind::BadInput,
    };
    ApiError::new(kind, error_line(error)).at(field)
}
