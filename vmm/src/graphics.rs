//! The host's side of a machine's graphics: made once, and kept over resets.

use std::{io, sync::Arc};

use fanlight_api::GpuConfig;
use fanlight_devices::{
    dmabuf::Exporter,
    virtio::{
        gpu::{DisplayConfig, DisplayHandle, Mode, NAME_MAX, OUTPUTS},
        input::{InputHandle, Kind},
    },
};
use thiserror::Error;

use crate::{display::Display, input::Inputs};

/// What is wrong with a GPU's configuration.
#[derive(Debug, Error)]
pub enum GraphicsError {
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
    /// Something of the host's failed.
    #[error("cannot make an event descriptor")]
    Host(#[from] io::Error),
}

/// Display and input devices, for whoever shows the one and feeds the others.
#[derive(Clone, Debug)]
pub struct Graphics {
    /// What the guest shows.
    pub display: DisplayHandle,
    /// Keyboard, pointer and touch screen.
    pub inputs: [InputHandle; 3],
    /// Root port of the GPU, if it is behind one.
    pub port: Option<u8>,
}

impl Graphics {
    /// Checks the configuration and makes what it describes.
    pub fn new(config: &GpuConfig) -> Result<Self, GraphicsError> {
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
            inputs: [
                InputHandle::new(Kind::Keyboard)?,
                InputHandle::new(Kind::Pointer)?,
                InputHandle::new(Kind::Touch)?,
            ],
            port: config.port,
        })
    }
}

impl Graphics {
    /// The same as the API offers it.
    pub fn display(&self) -> Display {
        let inputs = Inputs::new(self.display.clone(), self.inputs.clone());
        Display::new(self.display.clone(), inputs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_are_named() {
        let error = |text: &str| match Graphics::new(&text.parse().unwrap()) {
            Ok(_) => panic!("{text} is accepted"),
            Err(error) => error.to_string(),
        };
        assert!(error("outputs=1x1").starts_with("outputs=1x1: "));
        assert!(error("outputs=20000x600").contains("32 to 16384"));
        assert!(error("edid-name=").contains("1 to 13"));
        assert!(error("edid-name=fourteen chars").contains("fourteen chars"));
        let many = vec!["640x480"; 17].join("+");
        assert!(error(&many).contains("17 are more than 16"));
    }

    #[test]
    fn sixteen_outputs_are_there() {
        let config = vec!["640x480"; 16].join("+").parse().unwrap();
        let graphics = Graphics::new(&config).unwrap();
        let outputs = graphics.display.outputs();
        assert!(outputs.iter().all(|output| output.output.connected));
    }
}
