//! The host's side of a machine's graphics: made once, and kept over resets.

use std::{io, sync::Arc};

use fanlight_api::{ByteSize, GpuConfig, Renderer};
use fanlight_devices::{
    dma::SharedBlobDmaMap,
    dmabuf::Exporter,
    hypervisor::Hypervisor,
    memory::{ArenaError, GuestRam},
    virtio::{
        gpu::{
            DisplayConfig, DisplayHandle, Mode, NAME_MAX, OUTPUTS,
            render::{
                HostMemory, Rendering,
                wire::{CapsetInfo, Start},
            },
        },
        input::{InputHandle, Kind},
    },
};
use thiserror::Error;

use crate::renderer::{RendererError, Starter};

/// GPUs of a machine.
const MAX_GPUS: usize = 8;

/// What is wrong with a GPU's configuration.
#[derive(Debug, Error)]
pub enum GraphicsError {
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
    /// No size of a window into the renderer's memory.
    #[error("hostmem={0}: a power of two from 1M to 64G")]
    HostMemory(ByteSize),
    /// There is no renderer.
    #[error("renderer")]
    Renderer(#[from] RendererError),
    /// Something of the host's failed.
    #[error("cannot make an event descriptor")]
    Host(#[from] io::Error),
}

/// GPUs and input devices, for whoever shows what the ones do and feeds the others.
#[derive(Clone, Debug)]
pub struct Graphics {
    /// GPUs, in the guest's order.
    pub gpus: Vec<HostGpu>,
    /// Keyboard, pointer and touch screen.
    pub inputs: [InputHandle; 3],
}

/// The host's side of a GPU.
#[derive(Clone, Debug)]
pub struct HostGpu {
    /// What the guest shows.
    pub display: DisplayHandle,
    /// Its root port, if it is behind one.
    pub port: Option<u8>,
    /// What draws in 3D, if anything does.
    pub renderer: Option<RendererSetup>,
}

/// What a machine makes a GPU's 3D of.
#[derive(Clone, Debug)]
pub struct RendererSetup {
    starter: Arc<Starter>,
    capsets: Vec<CapsetInfo>,
    hostmem: u64,
    slot_per_blob: bool,
}

impl RendererSetup {
    const HOSTMEM: std::ops::RangeInclusive<u64> = 1 << 20..=64 << 30;

    fn new(config: &GpuConfig, ram: &GuestRam) -> Result<Option<Self>, GraphicsError> {
        let hostmem = config.hostmem.0;
        if !hostmem.is_power_of_two() || !Self::HOSTMEM.contains(&hostmem) {
            return Err(GraphicsError::HostMemory(config.hostmem));
        }
        if config.renderer == Renderer::None {
            return Ok(None);
        }
        let start = Start {
            virgl: config.renderer.has_virgl().into(),
            venus: config.renderer.has_venus().into(),
        };
        let starter = Arc::new(Starter::new(ram.file().clone(), start));
        Ok(Some(Self {
            capsets: starter.capabilities()?,
            starter,
            hostmem,
            slot_per_blob: config.hostmem_slots,
        }))
    }

    /// The GPU's part of it in one life of the machine.
    pub fn rendering(
        &self,
        hypervisor: Arc<dyn Hypervisor>,
        reach: Arc<SharedBlobDmaMap>,
    ) -> Result<Rendering, ArenaError> {
        Ok(Rendering {
            starter: self.starter.clone(),
            capsets: self.capsets.clone(),
            memory: HostMemory::new(self.hostmem, self.slot_per_blob, hypervisor, reach)?,
        })
    }
}

impl Graphics {
    /// Checks the configurations and makes what they describe. No GPU, no graphics.
    pub fn new(gpus: &[GpuConfig], ram: &GuestRam) -> Result<Option<Self>, GraphicsError> {
        if gpus.is_empty() {
            return Ok(None);
        }
        if gpus.len() > MAX_GPUS {
            return Err(GraphicsError::TooManyGpus(gpus.len()));
        }
        let gpus = gpus.iter().map(|gpu| HostGpu::new(gpu, ram));
        Ok(Some(Self {
            gpus: gpus.collect::<Result<_, _>>()?,
            inputs: [
                InputHandle::new(Kind::Keyboard)?,
                InputHandle::new(Kind::Pointer)?,
                InputHandle::new(Kind::Touch)?,
            ],
        }))
    }
}

impl HostGpu {
    fn new(config: &GpuConfig, ram: &GuestRam) -> Result<Self, GraphicsError> {
        let outputs = &config.outputs.0;
        if outputs.len() > OUTPUTS {
            return Err(GraphicsError::TooManyOutputs(outputs.len()));
        }
        let outputs = outputs.iter().map(|output| {
            let (width, height) = (output.width, output.height);
            let mode = Mode { width, height };
            if mode.is_valid() {
                Ok(mode)
            } else {
                Err(GraphicsError::BadMode { width, height })
            }
        });
        let outputs = outputs.collect::<Result<_, _>>()?;
        let name = &config.edid_name;
        let printable = name.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        if !printable || !(1..=NAME_MAX).contains(&name.len()) {
            return Err(GraphicsError::BadName(name.clone()));
        }
        let exporter = Exporter::open();
        if let Some(error) = exporter.problem() {
            tracing::info!("{}", fanlight_devices::error_line(error));
        }
        let display = DisplayConfig {
            outputs,
            name: name.clone(),
            max_resource_memory: config.max_resource_memory.0,
        };
        Ok(Self {
            display: DisplayHandle::new(display, Arc::new(exporter))?,
            port: config.port,
            renderer: RendererSetup::new(config, ram)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_are_named() {
        let ram = GuestRam::new(16 << 20, None).unwrap();
        let error = |text: &str| match HostGpu::new(&text.parse().unwrap(), &ram) {
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
    fn each_gpu_has_a_display() {
        let ram = GuestRam::new(16 << 20, None).unwrap();
        let made = |count| Graphics::new(&vec![GpuConfig::default(); count], &ram);
        assert!(made(0).unwrap().is_none());
        assert_eq!(made(MAX_GPUS).unwrap().unwrap().gpus.len(), MAX_GPUS);
        let error = made(MAX_GPUS + 1).unwrap_err().to_string();
        assert_eq!(error, "9 GPUs are more than 8");
    }

    #[test]
    fn sixteen_outputs_are_there() {
        let config = vec!["640x480"; 16].join("+").parse().unwrap();
        let ram = GuestRam::new(16 << 20, None).unwrap();
        let gpu = HostGpu::new(&config, &ram).unwrap();
        let outputs = gpu.display.outputs();
        assert!(outputs.iter().all(|output| output.output.connected));
    }
}
