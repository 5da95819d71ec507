//! GPUs: the display and the 3D renderer of each. Both are kept over resets.

use std::{io, ops::RangeInclusive, sync::Arc};

use fanlight_api::{ByteSize, GpuConfig, Renderer};
use fanlight_devices::{
    dmabuf::Exporter,
    error_line,
    memory::{ArenaError, GuestRam},
    virtio::gpu::{
        DisplayConfig, DisplayHandle, Gpu as GpuDevice, Mode, NAME_MAX, OUTPUTS,
        render::{
            HostMemory, Rendering,
            wire::{CapsetInfo, Start},
        },
    },
};
use thiserror::Error;

use super::{
    Device, Failure, Kind, Life, Opened, Opening,
    names::{NameError, check_port},
};
use crate::{
    renderer::{RendererError, RendererLauncher},
    vm::{
        fault::{Classify, Fault},
        function::Function,
    },
};

/// Display controller, other (PCI Code and ID Assignment 1.11).
const CLASS_DISPLAY_OTHER: u32 = 0x03_8000;

/// GPUs, in the configuration's order.
pub static KIND: Kind = Kind {
    field: "gpu",
    title: "GPU",
    open,
    hotplug: None,
};

/// A renderer that fails by itself does not work on this host.
impl Classify for RendererError {
    fn fault(&self) -> Fault {
        match self {
            RendererError::Start(_) => Fault::Host,
            RendererError::Failed(_) | RendererError::Ended => Fault::Input,
        }
    }
}

/// The size was checked before: only the host or a bug can cause it.
impl Classify for ArenaError {
    fn fault(&self) -> Fault {
        Fault::Host
    }
}

/// The most GPUs in a machine.
const MAX_GPUS: usize = 8;

/// Why a GPU cannot be opened or built.
#[derive(Debug, Error)]
pub enum GpuError {
    /// More GPUs than a machine has.
    #[error("{0} GPUs are more than {MAX_GPUS}")]
    TooManyGpus(usize),
    /// More outputs than the device has.
    #[error("outputs: {0} are more than {OUTPUTS}")]
    TooManyOutputs(usize),
    /// No output can be of this size.
    #[error(
        "outputs={width}x{height}: width and height must be from {min} to {max}",
        min = Mode::MIN,
        max = Mode::MAX
    )]
    BadMode {
        /// Pixels in a row.
        width: u32,
        /// Rows.
        height: u32,
    },
    /// Not a name that an EDID can hold.
    #[error("edid-name={0}: 1 to {NAME_MAX} printable ASCII characters")]
    BadName(String),
    /// Not a size for the window into the renderer's memory.
    #[error("hostmem={0}: a power of two from 1M to 64G")]
    HostMemory(ByteSize),
    /// There is no renderer.
    #[error("renderer")]
    Renderer(#[from] RendererError),
    /// The address range for the renderer's memory.
    #[error("hostmem")]
    Arena(#[from] ArenaError),
    /// The port.
    #[error(transparent)]
    Port(#[from] NameError),
    /// The host has no descriptor left.
    #[error("cannot make an event descriptor")]
    Host(#[from] io::Error),
}

impl Classify for GpuError {
    fn fault(&self) -> Fault {
        match self {
            Self::TooManyGpus(_)
            | Self::TooManyOutputs(_)
            | Self::BadMode { .. }
            | Self::BadName(_)
            | Self::HostMemory(_) => Fault::Input,
            Self::Renderer(error) => error.fault(),
            Self::Arena(error) => error.fault(),
            Self::Port(error) => error.fault(),
            Self::Host(_) => Fault::Host,
        }
    }
}

/// The host side of a GPU.
pub struct Gpu {
    id: String,
    port: Option<u8>,
    display: DisplayHandle,
    /// The 3D renderer, if there is one.
    renderer: Option<RendererSetup>,
}

/// The 3D renderer of a GPU.
struct RendererSetup {
    starter: Arc<RendererLauncher>,
    capsets: Vec<CapsetInfo>,
    hostmem: u64,
    slot_per_blob: bool,
}

impl RendererSetup {
    const HOSTMEM: RangeInclusive<u64> = 1 << 20..=64 << 30;

    fn new(config: &GpuConfig, ram: &GuestRam) -> Result<Option<Self>, GpuError> {
        let hostmem = config.hostmem.0;
        if !hostmem.is_power_of_two() || !Self::HOSTMEM.contains(&hostmem) {
            return Err(GpuError::HostMemory(config.hostmem));
        }
        if config.renderer == Renderer::None {
            return Ok(None);
        }
        let start = Start {
            virgl: config.renderer.has_virgl().into(),
            venus: config.renderer.has_venus().into(),
        };
        let starter = Arc::new(RendererLauncher::new(ram.file().clone(), start));
        Ok(Some(Self {
            capsets: starter.capabilities()?,
            starter,
            hostmem,
            slot_per_blob: config.hostmem_slots,
        }))
    }

    /// The renderer's part of the device in one life of the machine.
    fn rendering(&self, life: &Life) -> Result<Rendering, ArenaError> {
        let hypervisor = life.context.hypervisor.clone();
        let blobs = life.shared_blobs.clone();
        Ok(Rendering {
            starter: self.starter.clone(),
            capsets: self.capsets.clone(),
            memory: HostMemory::new(self.hostmem, self.slot_per_blob, hypervisor, blobs)?,
        })
    }
}

fn open(opening: &mut Opening) -> Opened {
    let configs = &opening.config.gpu;
    if configs.len() > MAX_GPUS {
        return Err(KIND.error(None, GpuError::TooManyGpus(configs.len())));
    }
    let ram = opening.ram;
    let numbered: Vec<_> = (0..)
        .map(|number| format!("gpu{number}"))
        .zip(configs)
        .collect();
    KIND.open_each(
        &numbered,
        |(id, _)| Some(id),
        |(id, config)| Ok(Gpu::open(id, config, ram)?),
    )
}

impl Gpu {
    fn open(id: &str, config: &GpuConfig, ram: &GuestRam) -> Result<Self, GpuError> {
        check_port(config.port)?;
        let outputs = &config.outputs.0;
        if outputs.len() > OUTPUTS {
            return Err(GpuError::TooManyOutputs(outputs.len()));
        }
        let outputs = outputs.iter().map(|output| {
            let (width, height) = (output.width, output.height);
            let mode = Mode { width, height };
            if mode.is_valid() {
                Ok(mode)
            } else {
                Err(GpuError::BadMode { width, height })
            }
        });
        let outputs = outputs.collect::<Result<_, _>>()?;
        let name = &config.edid_name;
        let printable = name.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        if !printable || !(1..=NAME_MAX).contains(&name.len()) {
            return Err(GpuError::BadName(name.clone()));
        }
        let exporter = Exporter::open();
        if let Some(error) = exporter.problem() {
            tracing::info!("{}", error_line(error));
        }
        let display = DisplayConfig {
            outputs,
            name: name.clone(),
            max_resource_memory: config.max_resource_memory.0,
        };
        Ok(Self {
            id: id.into(),
            display: DisplayHandle::new(display, Arc::new(exporter))?,
            port: config.port,
            renderer: RendererSetup::new(config, ram)?,
        })
    }

    /// The display handle, the same over all resets.
    pub fn display(&self) -> &DisplayHandle {
        &self.display
    }
}

impl Device for Gpu {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn port(&self) -> Option<u8> {
        self.port
    }

    fn build(&self, life: &mut Life) -> Result<Function, Failure> {
        let mut gpu = GpuDevice::new(self.display.clone(), life.context.memory.clone());
        if let Some(renderer) = &self.renderer {
            gpu = gpu.with_renderer(renderer.rendering(life).map_err(GpuError::Arena)?);
        }
        life.virtio(Box::new(gpu), CLASS_DISPLAY_OTHER)
    }

    fn shares_memory(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use fanlight_api::{VmConfig, socket::Descriptors};

    use super::*;
    use crate::vm::devices::Devices;

    #[test]
    fn mistakes_are_named() {
        let ram = GuestRam::new(16 << 20, None).unwrap();
        let error = |text: &str| match Gpu::open("gpu0", &text.parse().unwrap(), &ram) {
            Ok(_) => panic!("{text} is accepted"),
            Err(error) => error.to_string(),
        };
        assert!(error("outputs=1x1").starts_with("outputs=1x1: "));
        assert!(error("outputs=20000x600").contains("32 to 16384"));
        assert!(error("edid-name=").contains("1 to 13"));
        assert!(error("edid-name=fourteen chars").contains("fourteen chars"));
        assert!(error("800x600,hostmem=3M").starts_with("hostmem=3M: "));
        let many = vec!["640x480"; 17].join("+");
        assert!(error(&many).contains("17 are more than 16"));
    }

    #[test]
    fn gpus_have_names_and_there_are_eight() {
        let ram = GuestRam::new(16 << 20, None).unwrap();
        let opened = |count| {
            let config = VmConfig {
                gpu: vec![GpuConfig::default(); count],
                ..VmConfig::default()
            };
            open(&mut Opening {
                config: &config,
                descriptors: &Descriptors::Inherited,
                ram: &ram,
                present: &Devices::default(),
                console: None,
            })
        };
        assert!(opened(0).unwrap().is_empty());
        let gpus = opened(MAX_GPUS).unwrap();
        assert!(
            gpus.iter()
                .map(|gpu| gpu.id())
                .eq((0..MAX_GPUS).map(|n| format!("gpu{n}")))
        );
        let error = opened(MAX_GPUS + 1).map(|gpus| gpus.len()).unwrap_err();
        assert_eq!(error_line(&error), "GPU: 9 GPUs are more than 8");
    }

    #[test]
    fn sixteen_outputs_are_there() {
        let config = vec!["640x480"; 16].join("+").parse().unwrap();
        let ram = GuestRam::new(16 << 20, None).unwrap();
        let gpu = Gpu::open("gpu0", &config, &ram).unwrap();
        let outputs = gpu.display.outputs();
        assert!(outputs.iter().all(|output| output.output.connected));
    }
}
